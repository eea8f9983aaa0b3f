"""A directory of samples, opened for reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffusers_linattn.files import read_json
from diffusers_linattn.samples.arguments import form, together, unpack
from diffusers_linattn.samples.conditioning import shard_name, size_name
from diffusers_linattn.samples.model_call import ModelCall
from diffusers_linattn.samples.settings import FORMAT_VERSION, Assignment, check_model
from diffusers_linattn.samples.shards import broken_shards, read_shard


MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Batch:
    """Samples that stand in one batch, ready for a training step.

    Args:
        latents: `(batch, ...)` final latents in the form that the transformer takes them; one tensor, also where it
            takes a list.
        arguments: The other arguments of the transformer's forward, except the timestep.
        dtype: The transformer's when the samples were made.
    """

    latents: torch.Tensor
    arguments: dict[str, Any]
    dtype: torch.dtype = torch.float32

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The batch on a device: the latents in another dtype, and the arguments that were in the transformer's.

        What the pipeline passes in another one, such as rotary embeddings in fp32, stays in it.
        """
        return Batch(self.latents.to(device, dtype), _moved(self.arguments, device, self.dtype, dtype), dtype)


class Samples:
    """A directory written by [`make_samples`] or [`encode_images`], opened for reading.

    Args:
        directory: The directory.

    Raises:
        ValueError: No manifest, a manifest of another format, or a file that is missing or altered.

    Example:
        >>> samples = Samples("samples/")  # doctest: +SKIP
        >>> batch = samples.batch(samples.groups[0][:4])  # doctest: +SKIP
    """

    directory: Path
    manifest: dict[str, Any]
    call: ModelCall

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        manifest = self.directory / MANIFEST_NAME
        if not manifest.exists():  # written last
            raise ValueError(
                f"{manifest} does not exist: these are no samples, or not all of them yet. Run make_samples (again): "
                "it goes on where it was stopped."
            )
        self.manifest = read_json(manifest)
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{self.directory / MANIFEST_NAME} has format_version {version!r}, expected {FORMAT_VERSION}: make "
                "the samples again with make_samples, in another directory."
            )
        shards = self.manifest["shards"]
        broken = broken_shards([self.directory / name for name in shards], "checking samples")
        self._shards = {
            name: read_shard(self.directory / name) for name in shards if self.directory / name not in broken
        }
        # A whole file of another directory is as wrong as half of the right one.
        wrong = [name for name in shards if name not in self._shards or self._shards[name].digest != shards[name]]
        if wrong:
            raise ValueError(
                f"{self.directory / wrong[0]} is missing or altered: run make_samples again, it remakes what is not "
                "whole."
            )
        self._assignment = Assignment(self.manifest["settings"])
        self._plan = self.manifest["plan"]
        self.call = ModelCall(**self._plan["call"])

    def __len__(self) -> int:
        return self._assignment.num_samples

    @property
    def has_null(self) -> bool:
        """Whether the conditioning of no prompt is there, for prompt dropout."""
        return self._plan["null_prompt"] is not None

    def prompt_of(self, index: int) -> str | int:
        """The prompt or class label of a sample."""
        return self._assignment.prompts[self._assignment.prompt(self._checked(index))]

    def resolution_of(self, index: int) -> tuple[int, int]:
        """The `(height, width)` that a sample was made at, in pixels; `(0, 0)` where it was the pipeline's default."""
        return self._assignment.size(self._checked(index))

    @cached_property
    def groups(self) -> list[tuple[int, ...]]:
        """The samples that fit into one batch with each other: of one size, their arguments of one form."""
        groups: dict[tuple[str, str], list[int]] = {}
        for index in range(len(self)):
            groups.setdefault(self._form(index), []).append(index)
        return [tuple(group) for group in groups.values()]

    def null_fits(self, index: int) -> bool:
        """Whether the conditioning of no prompt can stand beside this sample's own in one batch."""
        return self.has_null and self._form(self._checked(index)) == self._form(index, null=True)

    def batch(self, indices: Sequence[int], without_prompt: Sequence[bool] | None = None) -> Batch:
        """Samples as the pipeline would give them to its transformer in one batch.

        Args:
            indices: The samples, from one of [`groups`]; one may stand there twice.
            without_prompt: For each, whether it gets the conditioning of no prompt instead of its own.

        Returns:
            The batch, on the CPU, in the dtypes that the pipeline uses.

        Raises:
            ValueError: No samples, samples that do not fit together, or no conditioning of no prompt.
        """
        without = [False] * len(indices) if without_prompt is None else list(without_prompt)
        if not indices or len(without) != len(indices):
            raise ValueError(
                f"Got {len(indices)} samples and {len(without)} values of without_prompt: expected one each."
            )
        if any(without) and not self.has_null:
            raise ValueError(
                f"{self.directory} has no conditioning of no prompt ({self._plan['no_null_because']}): train without "
                "prompt dropout."
            )
        chosen = [(self._checked(index), null) for index, null in zip(indices, without, strict=True)]
        if len({self._form(index, null) for index, null in chosen}) > 1:
            raise ValueError(
                f"The samples {list(indices)} differ in size or in the shape of their conditioning: take those of one "
                "batch from one of Samples.groups, and drop prompts only where null_fits says so."
            )
        latents = torch.stack([self._tensor(self._sample_shard(index), f"latents.{index}") for index, _ in chosen])
        trees = [self._arguments(index, null) for index, null in chosen]
        made_in: torch.dtype = getattr(torch, self.manifest["settings"]["model"]["dtype"])
        return Batch(latents, together(trees, self._plan["places"], self._plan["padding"]), made_in)

    def check_fits(self, pipe: Any) -> None:
        """Check that the samples can train the transformer of a pipeline, in whatever dtype it is.

        Raises:
            ValueError: Samples of another model, configuration or weights, or of another kind of scheduler.
        """
        check_model(self.manifest["settings"], pipe, self.directory)

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise ValueError(f"Sample {index} is not there: {self.directory} holds samples 0 to {len(self) - 1}.")
        return index

    def _sample_shard(self, index: int) -> str:
        return shard_name("samples", index // self._plan["samples_per_shard"])

    def _conditioning(self, index: int, null: bool = False) -> tuple[str, Any]:
        """Where a sample's arguments are: the name of the file, and the arguments as they were packed."""
        number = len(self._assignment.prompts) if null else self._assignment.prompt(index)
        shard, entry = divmod(number, self._plan["prompts_per_shard"])
        name = shard_name("conditioning", shard)
        packed = self._shards[name].record["prompts"][entry]["arguments"]
        return name, packed[size_name(self._assignment.size(index))]

    def _arguments(self, index: int, null: bool) -> Any:
        name, packed = self._conditioning(index, null)
        return unpack(packed, lambda tensor: self._tensor(name, tensor))

    def _form(self, index: int, null: bool = False) -> tuple[str, str]:
        size = size_name(self._assignment.size(index))
        number = -1 if null else self._assignment.prompt(index)
        if (number, size) not in self._forms:
            name, packed = self._conditioning(index, null)
            shapes = self._shards[name].shapes
            of_arguments = form(packed, shapes.__getitem__, self._plan["places"], self._plan["padding"])
            # The resolution as well: lists with an entry per sample may hold what is of one resolution alone.
            self._forms[number, size] = (size, of_arguments)
        return self._forms[number, size]

    @cached_property
    def _forms(self) -> dict[tuple[int, str], tuple[str, str]]:
        return {}

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    def _tensor(self, shard: str, name: str) -> torch.Tensor:
        if shard not in self._files:
            self._files[shard] = safe_open(self.directory / shard, framework="pt")
        return self._files[shard].get_tensor(name)


def _moved(tree: Any, device: torch.device | str, old: torch.dtype, new: torch.dtype) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.to(device, new if tree.dtype == old else None)
    if isinstance(tree, dict):
        return {name: _moved(part, device, old, new) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_moved(part, device, old, new) for part in tree)
    return tree
