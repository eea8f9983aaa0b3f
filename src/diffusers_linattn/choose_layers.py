"""Which layers to convert when some may stay dense: those that the mechanism can imitate best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_linattn.generation import check_pipeline
from diffusers_linattn.linearize import layers_of, linearize, restore, single_transformer_of
from diffusers_linattn.ops.checks import check_positive_int
from diffusers_linattn.processors import BaseProcessor
from diffusers_linattn.samples import ONE_TRANSFORMER, Samples
from diffusers_linattn.training.config import DistillConfig
from diffusers_linattn.training.environment import accelerator_for, model_options
from diffusers_linattn.training.loop import Loop, check_batch, prompt_dropout_of
from diffusers_linattn.training.objective import objective_of
from diffusers_linattn.training.optimizers import check_optimizer
from diffusers_linattn.training.phases import last_layer_losses, transfer_phases
from diffusers_linattn.training.trainable import check_trainable, in_training, trained_parameters


@dataclass(frozen=True)
class LayerChoice:
    """What [`choose_layers`] found.

    Args:
        losses: The transfer loss of each layer by name: squared error relative to the teacher's attention output.
        layers: The layers to convert, in the order of the model.
        dense: The layers to leave as they are.
        mapping: For [`linearize`]: the processor for the first, `None` for the second.
    """

    losses: dict[str, float]
    layers: list[str]
    dense: list[str]
    mapping: dict[str, BaseProcessor | None]


def choose_layers(
    pipe: Any,
    processor: BaseProcessor,
    samples: Samples | str | Path,
    keep: float = 0.5,
    *,
    steps: int = 100,
    config: DistillConfig | None = None,
    **options: Any,
) -> LayerChoice:
    """Find the layers whose attention a mechanism imitates best, by a short attention transfer of all of them.

    Converting half of the layers costs little quality and all of them much, and layers differ (Grafting). Each layer
    is trained by itself on the teacher's inputs; the `keep` share with the largest loss over the last quarter of the
    steps stays dense. The pipeline is left as it was.

    Args:
        pipe: A pipeline with its original attention.
        processor: The mechanism, a template as for [`linearize`].
        samples: What [`make_samples`] made, or its directory.
        keep: Share of the layers that stay dense, from 0 up to but not including 1; rounded to whole layers.
        steps: Steps of the transfer.
        config: Settings of the transfer; `None` is the defaults of [`DistillConfig`].
        options: Settings by name, as for [`distill`].

    Returns:
        The losses, the layers to convert, and the mapping for [`linearize`].

    Raises:
        ValueError: A pipeline that is converted already, a `keep` out of range or that leaves nothing to convert, or
            what [`distill`] raises.

    Example:
        >>> choice = choose_layers(pipe, LinearProcessor(), "samples/", keep=0.5)  # doctest: +SKIP
        >>> linearize(pipe, choice.mapping)  # doctest: +SKIP
    """
    check_pipeline(pipe)
    ignored = sorted({"transfer_steps", "steps", "validation_steps", "report_to", "ema_decay"} & options.keys())
    if ignored:
        raise ValueError(f"choose_layers has no setting {', '.join(ignored)}: steps= is its number of steps.")
    check_positive_int("steps", steps)
    settings = DistillConfig.of(config, {**options, "transfer_steps": steps, "steps": 0})
    model = single_transformer_of(pipe, ONE_TRANSFORMER)
    converted = [layer.name for layer in layers_of(model) if layer.processor is not None]
    if converted:
        raise ValueError(
            f"{len(converted)} layers are converted already ({converted[0]} …): choose_layers compares with the "
            "original attention, restore(pipe) it first."
        )
    names = [layer.name for layer in layers_of(model)]
    number_dense = _number_dense(keep, len(names))
    samples = samples if isinstance(samples, Samples) else Samples(samples)
    samples.check_fits(pipe)
    settings = replace(settings, prompt_dropout=prompt_dropout_of(model, samples, settings))
    linearize(model, processor)
    try:
        losses = _transfer_losses(pipe, model, samples, settings)
    finally:
        restore(model)
    dense = set(sorted(names, key=lambda name: losses[name], reverse=True)[:number_dense])
    return LayerChoice(
        losses={name: losses[name] for name in names},
        layers=[name for name in names if name not in dense],
        dense=[name for name in names if name in dense],
        mapping={name: None if name in dense else processor for name in names},
    )


def _transfer_losses(pipe: Any, model: Any, samples: Samples, config: DistillConfig) -> dict[str, float]:
    layers = layers_of(model)
    check_trainable(model, layers, config)
    check_optimizer(config)
    objective = objective_of(pipe)
    with (
        accelerator_for(model, config, None) as accelerator,
        model_options(model, config),
        trained_parameters(model, layers, config) as parameters,
        in_training(model, parameters),
    ):
        check_batch(samples, config, accelerator)
        phases = transfer_phases(model, layers, samples.call, parameters, config)
        rows = Loop(accelerator, config, samples, objective, model, parameters, None).run(phases, None)
    return last_layer_losses(rows, max(1, config.transfer_steps // 4))


def _number_dense(keep: float, layers: int) -> int:
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 <= keep < 1:
        raise ValueError(f"keep must be a share of the layers, at least 0 and below 1, got {keep!r}.")
    number = round(keep * layers)
    if number == layers:
        raise ValueError(f"keep={keep} leaves none of the {layers} layers to convert: lower it.")
    return number
