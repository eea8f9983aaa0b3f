"""The files of conditioning: what the transformer is called with for each prompt, at each resolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffusers_linattn.samples.arguments import content_name, pack
from diffusers_linattn.samples.model_call import ModelCall
from diffusers_linattn.samples.probe import conditioning_of, latents_of
from diffusers_linattn.samples.recorder import Recorder
from diffusers_linattn.samples.work import Content, Job


Size = tuple[int, int]


def size_name(size: Size) -> str:
    """The name of a resolution in records."""
    return f"{size[0]}x{size[1]}"


def size_arguments(size: Size) -> dict[str, int]:
    """Arguments of a pipeline's call for a resolution; none for the default."""
    return {"height": size[0], "width": size[1]} if any(size) else {}


def shard_name(kind: str, number: int) -> str:
    """The name of a file, such as `samples-00003.safetensors`."""
    return f"{kind}-{number:05d}.safetensors"


class ConditioningRecorder:
    """Records the arguments of the transformer for one prompt after another.

    Args:
        recorder: Of the pipeline.
        call: How the transformer is called.
        without_guidance: Arguments of the pipeline's call that switch guidance off.
    """

    def __init__(self, recorder: Recorder, call: ModelCall, without_guidance: dict[str, Any]):
        self.recorder, self.call, self.without_guidance = recorder, call, without_guidance

    def arguments(self, prompt: Any, size: Size) -> dict[str, Any]:
        """What the transformer is called with for one prompt, without latents and timestep."""
        return conditioning_of(self.call, self._first_call(prompt, size))

    def latent_shape(self, prompt: Any, size: Size) -> list[int]:
        """The shape of one sample's latents as the transformer takes them."""
        return list(latents_of(self.call, self._first_call(prompt, size)).shape[1:])

    def _first_call(self, prompt: Any, size: Size) -> dict[str, Any]:
        return self.recorder.first_call([prompt], size_arguments(size) | self.without_guidance)

    def content(self, prompts: Sequence[tuple[Any, Sequence[Size]]], made: Callable[[int], Any]) -> Content:
        """The tensors and the record of one file; a tensor that several prompts or resolutions share is there once."""
        tensors: dict[str, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> str:
            plain = tensor.detach().cpu().contiguous().clone()
            name = content_name(plain)
            tensors[name] = plain
            return name

        entries = []
        for prompt, sizes in prompts:
            packed = {size_name(size): pack(self.arguments(prompt, size), keep) for size in sizes}
            entries.append({"prompt": prompt, "arguments": packed})
            made(1)
        return tensors, {"prompts": entries}

    def jobs(self, prompts: Sequence[tuple[Any, Sequence[Size]]], per_shard: int) -> list[Job]:
        """One job for each file."""

        def job(number: int, chosen: Sequence[tuple[Any, Sequence[Size]]]) -> Job:
            return Job(shard_name("conditioning", number), len(chosen), lambda made: self.content(chosen, made))

        starts = range(0, len(prompts), per_shard)
        return [job(number, prompts[start : start + per_shard]) for number, start in enumerate(starts)]
