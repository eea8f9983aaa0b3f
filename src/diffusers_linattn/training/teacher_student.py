"""The two stages of training as modules: a batch in, its losses out. The teacher is the student switched back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_linattn.linearize import Layer, original_attention
from diffusers_linattn.samples import ModelCall
from diffusers_linattn.training.config import DistillConfig
from diffusers_linattn.training.objective import split_variance


# The terms of the loss end to end; the settings have a weight for each.
TERMS = ("diffusion", "prediction", "attention", "variance")


@dataclass(frozen=True)
class TrainingBatch:
    """What a step trains on.

    Args:
        latents: (batch, ...) noisy latents.
        timesteps: (batch,) in the scheduler's units.
        target: Like the latents: what a perfect model would predict.
        arguments: The other arguments of the transformer.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    arguments: dict[str, Any]


class Stage(nn.Module):
    """A stage of training; the model is a submodule, so that what wraps modules for several processes can wrap it."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], call: ModelCall, config: DistillConfig):
        super().__init__()
        self.model, self.layers, self.call, self.config = model, layers, call, config

    def predict(self, batch: TrainingBatch) -> torch.Tensor:
        return self.call.predict(self.model, batch.latents, batch.timesteps, batch.arguments)

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Within this context the model is its own teacher."""
        # Autocast keeps casts by parameter, and knows nothing of values that are switched.
        torch.clear_autocast_cache()
        with original_attention(self.model), torch.no_grad():
            yield
        torch.clear_autocast_cache()


class AttentionTransfer(Stage):
    """Each layer by itself on the teacher's inputs, towards the teacher's attention output.

    Errors are relative to the mean square of the teacher's output for each sample, so that layers weigh alike. There
    is no backward pass through the network.
    """

    def forward(self, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """The loss of each layer by name, and their sum as `"total"`, which is what is minimised."""
        with self.teacher(), recorded(self.layers) as records:
            self.predict(batch)
        losses = {}
        for layer in self.layers:
            record = records.pop(layer.name)
            if self.config.gradient_checkpointing:
                losses[layer.name] = checkpoint(_relative_error, layer.attn, record, use_reentrant=False)
            else:
                losses[layer.name] = _relative_error(layer.attn, record)
        mean = torch.stack([loss.detach() for loss in losses.values()]).mean()
        return {"total": torch.stack(list(losses.values())).sum(), "loss": mean, **losses}


class EndToEnd(Stage):
    """The model's own loss, and the distances to the teacher's prediction, variance and attention outputs."""

    def forward(self, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """The terms by name, and their weighted sum as `"total"` and `"loss"`."""
        with self.teacher(), recorded(self.layers) as teachers:
            taught, taught_variance = split_variance(self.predict(batch), batch.latents)
        with recorded(self.layers) as students:
            learned, variance = split_variance(self.predict(batch), batch.latents)
        attention = [
            torch.stack([_mse(s, t) for s, t in zip(students[name].outputs, record.outputs, strict=True)]).mean()
            for name, record in teachers.items()
        ]
        terms = {
            "diffusion": _mse(learned, batch.target),
            "prediction": _mse(learned, taught),
            "attention": torch.stack(attention).mean(),
        }
        if variance is not None and taught_variance is not None:
            terms["variance"] = _mse(variance, taught_variance)
        total = torch.stack([getattr(self.config, f"{name}_weight") * term for name, term in terms.items()]).sum()
        return {"total": total, "loss": total.detach(), **terms}


@dataclass(frozen=True)
class Record:
    """One call of an attention layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[torch.Tensor]


@contextmanager
def recorded(layers: Sequence[Layer]) -> Iterator[dict[str, Record]]:
    """Collects, by layer name, the inputs and outputs of the attention layers while the model runs."""
    records: dict[str, Record] = {}
    names = {layer.attn: layer.name for layer in layers}

    # One function for all layers, not traced: compiled blocks would be compiled anew for each layer's own.
    @torch.compiler.disable
    def hook(attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        records[names[attn]] = Record(args, kwargs, _tensors(output))

    handles = [layer.attn.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _relative_error(attn: Any, record: Record) -> torch.Tensor:
    outputs = _tensors(attn(*record.args, **record.kwargs))
    ratios = [
        # Sample by sample, so that a batch counts the same however it is split.
        (_mean_square(student.float() - teacher.float()) / _mean_square(teacher.float()).clamp_min(1e-12)).mean()
        for student, teacher in zip(outputs, record.outputs, strict=True)
    ]
    return torch.stack(ratios).sum()


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    """(batch, ...) to (batch,)."""
    return x.square().flatten(1).mean(1)


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [part for part in output if part is not None]


def _mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(student.float(), teacher.float())
