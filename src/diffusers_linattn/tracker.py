"""Follows the token layout of a transformer from call to call, so that its attention processors can read it."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.lora import LORA_NAME, lora_off
from diffusers_linattn.models import Family, ForwardArguments, Layouts
from diffusers_linattn.models.family import Memo


Scopes = dict[str, tuple[TokenLayout, ...]]

CONTEXT_PARALLELISM = (
    "Context parallelism splits the sequence, which windows and scans over the token grid cannot see across yet. "
    "Disable it, or restore(model) the original attention first."
)


class LayoutTracker:
    """A forward pre-hook that works out the token layouts of each call of one transformer.

    The processors of the model share the tracker; neither refers to the model.
    """

    def __init__(self, model: nn.Module, family: Family):
        self.family = family
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.last: Scopes = {}  # of the latest call, by whichever thread
        self._of_thread = threading.local()
        self._traced = False  # whether the latest call was a compiled one, which cannot tell threads apart
        self.device: torch.device | None = None  # of the latest call; offloaded weights are elsewhere after it
        self.installed: tuple[str, ...] = ()
        self._warned = False
        self._lora_warning = ""  # of the latest call
        self._memo: Memo = {}
        self._shapes: dict[str, list[list[tuple[str, torch.Tensor]]]] = {}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_not_parallel(model)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.set(_by_scope(self.family.layout(model, ForwardArguments(arguments, self._memo))))
        if not torch.compiler.is_compiling():
            self.device = next((x.device for x in arguments.values() if isinstance(x, torch.Tensor)), None)
        if torch.is_grad_enabled():
            _prepare_for_training(model, self)
        if not torch.compiler.is_compiling() and self.installed:
            self._warn_of_changes(model)

    def set(self, scopes: Scopes) -> None:
        """Make `scopes` what [`layouts_of`] answers with."""
        self.own = scopes
        self._traced = torch.compiler.is_compiling()
        if not self._traced and scopes == self.last:  # Dynamo cannot compare them
            return
        self.last = scopes
        # The sizes again, as shapes of tensors without elements: inside a compiled block they become symbolic sizes,
        # where plain integers would be guards and cost one graph for each resolution.
        self._shapes = {
            scope: [
                [(segment.kind, torch.empty(0, *(segment.grid or (segment.length,)))) for segment in layout.segments]
                for layout in layouts
            ]
            for scope, layouts in scopes.items()
        }

    @property
    def own(self) -> Scopes | None:
        """The layouts of this thread's latest call that was not compiled, `None` before the first."""
        return None if torch.compiler.is_compiling() else getattr(self._of_thread, "scopes", None)

    @own.setter
    def own(self, scopes: Scopes | None) -> None:
        if not torch.compiler.is_compiling():
            self._of_thread.scopes = scopes

    @property
    def current(self) -> Scopes:
        """The layouts of this thread's latest call; of the latest by any where it has none, as in autograd."""
        own = self.own
        return self.last if self._traced or own is None else own

    def layouts_of(self, scope: str) -> tuple[TokenLayout, ...]:
        """The layouts of the current call for a layer of that scope: one for all samples, or one for each.

        Raises:
            ValueError: The model has not been called: its layers cannot be called on their own.
        """
        layouts = self.current.get(scope)
        if layouts is None:
            raise ValueError(
                "No token layout: call the transformer as model(...) (or its pipeline), not model.forward(...) or one "
                "of its layers. The layout is read from the arguments, by a hook that forward(...) skips."
            )
        if torch.compiler.is_compiling():
            return tuple(_layout_of_shapes(shapes) for shapes in self._shapes[scope])
        return layouts

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_of_thread"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _of_thread=threading.local())

    def watch(self, names: tuple[str, ...]) -> None:
        """Warn at the next call, once, when one of these layers has lost its processor to another, and once for each
        state in which they run without the LoRA trained with them."""
        self.installed = names
        self._warned = False

    def _warn_of_changes(self, model: nn.Module) -> None:
        replaced, off = {}, {}
        for name in self.installed:
            try:
                attn: Any = model.get_submodule(name)
                processor = attn.processor
            except AttributeError:  # the block was taken out of the model
                continue
            if getattr(processor, "tracker", None) is not self:
                replaced[name] = type(processor).__name__
            elif why := lora_off(attn, processor.lora):
                off[name] = why
        if replaced and not self._warned:
            self._warned = True
            kinds = ", ".join(sorted(set(replaced.values())))
            warnings.warn(
                f"{len(replaced)} of {len(self.installed)} converted layers ({next(iter(replaced))} …) have another "
                f"processor now ({kinds}): something replaced it, as loading an IP-Adapter does. Convert them again "
                "with linearize(), or restore() the model.",
                stacklevel=4,
            )
        warning = ""
        if off:
            name, why = next(iter(off.items()))
            warning = (
                f"{len(off)} of {len(self.installed)} converted layers ({name} …) are not as they were trained: their "
                f'LoRA "{LORA_NAME}" {why}.'
            )
        if warning and warning != self._lora_warning:
            warnings.warn(warning, stacklevel=4)
        self._lora_warning = warning


def _by_scope(found: Layouts | Mapping[str, Layouts]) -> Scopes:
    scopes: Scopes = {}
    for scope, layouts in (found if isinstance(found, Mapping) else {"joint": found}).items():
        layouts = (layouts,) if isinstance(layouts, TokenLayout) else tuple(layouts)
        alike = all(layout == layouts[0] for layout in layouts)
        scopes[scope] = layouts[:1] if alike else layouts
    if "joint" in scopes:
        scopes.setdefault("queries", scopes["joint"])
        if "image" not in scopes:
            images = tuple(layout.image_part() for layout in scopes["joint"])
            scopes["image"] = images[:1] if all(image == images[0] for image in images) else images
    return scopes


def _layout_of_shapes(shapes: list[tuple[str, torch.Tensor]]) -> TokenLayout:
    sizes = [(kind, tuple(size.shape[1:])) for kind, size in shapes]
    return TokenLayout.of([(kind, size if len(size) == 3 else size[0]) for kind, size in sizes])


class CheckpointWithLayout:
    """A gradient checkpointing function that recomputes each block under the layout of its forward pass.

    Without it, recomputation during backward would see the layout of the latest forward, which may be another size.
    """

    def __init__(self, checkpoint: Callable[..., Any], tracker: LayoutTracker):
        self.checkpoint = checkpoint
        self.tracker = tracker

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layout = self.tracker.current

        def run(*inputs: Any, **named: Any) -> Any:
            current, own = self.tracker.current, self.tracker.own
            self.tracker.set(layout)
            try:
                return block(*inputs, **named)
            finally:
                self.tracker.set(current)
                self.tracker.own = own  # often in a thread of autograd, which calls no model

        return self.checkpoint(run, *args, **kwargs)


@torch.compiler.disable
def _prepare_for_training(model: nn.Module, tracker: LayoutTracker) -> None:
    """What a forward pass with gradients needs: layouts carried through checkpoints, weights kept for `restore`."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function: Any = module._gradient_checkpointing_func
            if not isinstance(function, CheckpointWithLayout):
                module._gradient_checkpointing_func = CheckpointWithLayout(function, tracker)  # type: ignore[assignment]
        processor: Any = getattr(module, "processor", None)
        if getattr(processor, "tracker", None) is tracker:
            trained = [name for name, p in processor.weights_of(module).items() if p.requires_grad]
            processor.keep_original_weights(module, trained)


def check_not_parallel(model: nn.Module) -> None:
    """Raise where diffusers has split a model over devices (`enable_parallelism`, `from_pretrained`)."""
    config = getattr(model, "_parallel_config", None)
    if config is None:
        return
    if getattr(config, "tensor_parallel_config", None) is not None:
        raise NotImplementedError(
            "Tensor parallelism splits the projections over devices, and the weights of converted layers are not "
            "split with them yet. Load the model without it, or restore(model) the original attention first."
        )
    raise NotImplementedError(CONTEXT_PARALLELISM)


def install_tracker(model: nn.Module, family: Family) -> LayoutTracker:
    """The tracker of a model, hooked onto it if it has none yet."""
    tracker = find_tracker(model)
    if tracker is None:
        tracker = LayoutTracker(model, family)
        model.register_forward_pre_hook(tracker, with_kwargs=True)
    return tracker


def find_tracker(model: nn.Module) -> LayoutTracker | None:
    """The tracker hooked onto a model. Found by type, so that it is also found on a deep copy."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, LayoutTracker)), None)


def remove_tracker(model: nn.Module) -> None:
    """Take the hook off again, and give back the checkpointing functions."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, LayoutTracker):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, CheckpointWithLayout):
            module._gradient_checkpointing_func = function.checkpoint  # type: ignore[assignment]
