"""Records what a pipeline gives its transformer, from runs that stop before the transformer works."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffusers_linattn.generation import (
    Step,
    call_parameters,
    call_pipeline,
    caught_steps,
    check_pipeline,
    generators_of,
    prompt_argument,
)
from diffusers_linattn.linearize import original_attention, single_transformer_of
from diffusers_linattn.samples.model_call import output_of


ONE_TRANSFORMER = "distillation covers pipelines with one. The attention of all can be swapped with linearize."


class _Stop(BaseException):
    """Ends a run of a pipeline; no Exception, which a pipeline might catch."""


@dataclass
class Run:
    """The first steps of a run: each call of the transformer, its output, and the scheduler's step."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


class Recorder:
    """A pipeline whose transformer's arguments are recorded, for one prompt and without classifier-free guidance.

    Args:
        pipe: The pipeline.
        call_arguments: For its call.

    Raises:
        ValueError: No pipeline, several transformers, a call without prompts or class labels, or guidance that cannot
            be switched off.
    """

    def __init__(self, pipe: Any, call_arguments: dict[str, Any]):
        check_pipeline(pipe)
        self.pipe = pipe
        self.model = single_transformer_of(pipe, ONE_TRANSFORMER)
        self.names = tuple(inspect.signature(type(self.model).forward).parameters)[1:]
        self.of_classes = prompt_argument(pipe) == "class_labels"
        self.call_arguments = call_arguments

    def without_guidance(self, prompt: str | int, size: dict[str, int]) -> dict[str, Any]:
        """The arguments of the call that switch classifier-free guidance off, as few as are needed."""
        known = call_parameters(self.pipe)
        off = {"true_cfg_scale": 1.0} if "true_cfg_scale" in known else {}
        # Z-Image and others guide at any scale above 0. Models that were distilled with guidance take it as an input.
        for changes in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 0.0}):
            if not changes.keys() <= known.keys():
                continue
            call = self.first_call([prompt], size | off | changes)
            if not changes and not isinstance(call.get("guidance"), torch.Tensor) and "guidance_scale" in known:
                continue
            batch = len(call[self.names[0]])
            if batch == 1:
                return off | changes
        raise ValueError(
            f"{type(self.pipe).__name__} calls its transformer with a batch of {batch} for one prompt, even with "
            f"{', '.join(f'{name}={value}' for name, value in (off | changes).items()) or 'its default arguments'}: "
            "expected 1. What the transformer takes for one sample cannot be told."
        )

    def first_call(self, prompts: Sequence[Any], arguments: dict[str, Any], seed: int = 0) -> dict[str, Any]:
        """What the transformer is first called with, by argument name; the transformer itself does not run."""
        found: list[dict[str, Any]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(self._by_name(args, kwargs))
            raise _Stop

        module = self._called_module()
        handle = module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            with _uncompiled(module):
                self._until_stop(prompts, arguments, seed)
        finally:
            handle.remove()
        if not found:
            raise ValueError(f"{type(self.pipe).__name__} did not call its {type(self.model).__name__}.")
        return found[0]

    def first_steps(self, prompt: Any, arguments: dict[str, Any], steps: int = 3) -> Run:
        """Run the first steps with the original attention, and keep what passes by."""
        run = Run()

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            run.calls.append(self._by_name(args, kwargs))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            run.outputs.append(output_of(output).clone())

        def stepped(step: Step) -> None:
            run.steps.append(step)
            if len(run.steps) == steps:
                raise _Stop

        module = self._called_module()
        handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        try:
            with original_attention(self.pipe), _uncompiled(module), caught_steps(self.pipe, stepped):
                self._until_stop([prompt], arguments)
        finally:
            for handle in handles:
                handle.remove()
        return run

    def until_decoding(self, vae: Any, prompt: Any, arguments: dict[str, Any]) -> torch.Tensor:
        """Run the pipeline until it decodes, and return what the VAE is given."""
        found: list[torch.Tensor] = []

        def stop(latents: torch.Tensor, *_: Any, **__: Any) -> None:
            found.append(latents)
            raise _Stop

        before = vars(vae).get("decode")
        vae.decode = stop
        try:
            self._until_stop([prompt], arguments)
        finally:
            del vae.decode
            if before is not None:
                vae.decode = before
        if not found:
            raise ValueError(f"{type(self.pipe).__name__} did not decode its latents with its VAE.")
        return found[0]

    def _until_stop(self, prompts: Sequence[Any], arguments: dict[str, Any], seed: int = 0) -> None:
        try:
            call_pipeline(self.pipe, prompts, generators_of([seed] * len(prompts)), self.call_arguments | arguments)
        except _Stop:
            self.pipe.maybe_free_model_hooks()  # as at the end of a call: models go back to where they wait

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def _called_module(self) -> Any:
        """The transformer as the pipeline calls it: torch.compile puts a module around it, whose hooks run outside."""
        parts = self.pipe.components.values()
        return next(part for part in parts if getattr(part, "_orig_mod", part) is self.model)


@contextmanager
def _uncompiled(module: Any) -> Iterator[None]:
    """Within this context a module that was compiled in place runs as it is: its hooks would be traced."""
    compiled: Callable[..., Any] | None = module._compiled_call_impl
    module._compiled_call_impl = None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled
