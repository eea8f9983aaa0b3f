"""Checkpoints of a training run: folders that appear whole, at most so many, the latest found again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_linattn.files import read_json, write_json


TRAINED_NAME = "trained.safetensors"
AVERAGE_NAME = "average.safetensors"
POSITION_NAME = "position.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def find_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [(int(match[1]), path) for path in directory.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoint_to_resume(directory: Path, name: str | None) -> Path | None:
    """The checkpoint that a run goes on from.

    Raises:
        ValueError: One that does not exist, or `None` although there are checkpoints, which would be overwritten.
    """
    found = find_checkpoints(directory)
    if name is None:
        if found:
            raise ValueError(
                f"{directory} holds {found[-1].name}: give resume_from_checkpoint='latest' to go on, or another "
                "output_dir, or delete it."
            )
        return None
    if name == "latest":
        return found[-1] if found else None
    chosen = directory / Path(name).name
    if chosen not in found:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{directory} has no checkpoint {name!r}; there is {names}.")
    return chosen


class TrainedWeights:
    """Makes `accelerator.save_state` and `load_state` write and read the trained weights, not the whole model.

    Args:
        accelerator: Gets the hooks.
        parameters: All trained weights, by name.
        averages: Their moving averages, as far as there are any.
    """

    def __init__(
        self, accelerator: Accelerator, parameters: Mapping[str, torch.Tensor], averages: Mapping[str, torch.Tensor]
    ):
        self.accelerator, self.parameters, self.averages = accelerator, parameters, averages
        self._handles = [
            accelerator.register_save_state_pre_hook(self._save),
            accelerator.register_load_state_pre_hook(self._load),
        ]

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _save(self, models: list[nn.Module], weights: list[Any], directory: str) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            save_file(_on_cpu(self.parameters), Path(directory) / TRAINED_NAME)
            if self.averages:
                save_file(_on_cpu(self.averages), Path(directory) / AVERAGE_NAME)

    def _load(self, models: list[nn.Module], directory: str) -> None:
        models.clear()
        _copy(load_file(Path(directory) / TRAINED_NAME), self.parameters)
        if self.averages:
            _copy(load_file(Path(directory) / AVERAGE_NAME), self.averages)


def write_checkpoint(
    accelerator: Accelerator, directory: Path, number: int, position: dict[str, Any], limit: int | None
) -> Path:
    """Write `checkpoint-{number}`, and delete the oldest beyond `limit`. Every process has to call this."""
    path = directory / f"checkpoint-{number}"
    partial = directory / f".{path.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(partial / POSITION_NAME, position)
        shutil.rmtree(path, ignore_errors=True)  # of a longer run that was resumed from an earlier checkpoint
        partial.replace(path)
        if limit is not None:
            for old in find_checkpoints(directory)[:-limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def read_position(checkpoint: Path) -> dict[str, Any]:
    """What [`write_checkpoint`] was given as `position`."""
    position: dict[str, Any] = read_json(checkpoint / POSITION_NAME)
    return position


def remove_checkpoints_after(checkpoint: Path) -> None:
    """Delete the checkpoints newer than one that a run goes on from: their steps are taken again."""
    found = find_checkpoints(checkpoint.parent)
    for path in found[found.index(checkpoint) + 1 :]:
        shutil.rmtree(path)


def remove_checkpoints(directory: Path) -> None:
    """Delete all checkpoints, and what is left of one that was being written."""
    for path in [*find_checkpoints(directory), *directory.glob(".checkpoint-*.partial")]:
        shutil.rmtree(path)


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _copy(values: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    if set(values) != set(tensors):
        raise ValueError("The checkpoint holds other weights than those that are trained: it is of another run.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])
