"""The phases of a distillation: the transfer, in groups of layers, and then all layers end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import nn

from diffusers_linattn.linearize import Layer
from diffusers_linattn.samples import ModelCall
from diffusers_linattn.training.config import DistillConfig
from diffusers_linattn.training.teacher_student import AttentionTransfer, EndToEnd, Stage


STAGES = ("transfer", "end_to_end")


@dataclass(frozen=True)
class Phase:
    """A run of steps with one loss and one optimizer.

    Args:
        name: `"transfer"` or `"end_to_end"`.
        stage: Computes the losses.
        parameters: What is trained in it, by name.
        steps: Optimizer steps.
        learning_rate: The highest one.
    """

    name: str
    stage: Stage
    parameters: Mapping[str, nn.Parameter]
    steps: int
    learning_rate: float


def transfer_phases(
    model: nn.Module,
    layers: Sequence[Layer],
    call: ModelCall,
    parameters: Mapping[str, nn.Parameter],
    config: DistillConfig,
) -> list[Phase]:
    """A phase for each group of layers that has something to train."""
    size = config.layers_per_group or len(layers)
    phases = []
    for first in range(0, len(layers) if config.transfer_steps else 0, size):
        group = layers[first : first + size]
        prefixes = tuple(f"{layer.name}." for layer in group)
        trained = {name: parameter for name, parameter in parameters.items() if name.startswith(prefixes)}
        if trained:
            stage = AttentionTransfer(model, group, call, config)
            phases.append(Phase(STAGES[0], stage, trained, config.transfer_steps, config.transfer_learning_rate))
    return phases


def end_to_end_phases(
    model: nn.Module,
    layers: Sequence[Layer],
    call: ModelCall,
    parameters: Mapping[str, nn.Parameter],
    config: DistillConfig,
) -> list[Phase]:
    """The phase of all layers, if there are steps for it."""
    stage = EndToEnd(model, layers, call, config)
    return [Phase(STAGES[1], stage, parameters, config.steps, config.learning_rate)] if config.steps else []


def last_layer_losses(rows: Sequence[Mapping[str, Any]], steps: int) -> dict[str, float]:
    """The transfer loss of each layer by name, averaged over the last steps of its group."""
    by_layer: dict[str, list[float]] = {}
    for row in rows:
        for name in row.keys() - {"step", "stage", "loss", "learning_rate"}:
            by_layer.setdefault(name, []).append(row[name])
    return {name: fmean(losses[-steps:]) for name, losses in by_layer.items()}
