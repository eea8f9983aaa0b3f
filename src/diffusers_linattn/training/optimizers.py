"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn

from diffusers_linattn.training.config import DistillConfig


# Optimizers of other packages: (module, class, name on PyPI).
OTHER_PACKAGES = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt"),
}


def check_optimizer(config: DistillConfig) -> None:
    """Raise if the optimizer or the schedule of this configuration cannot be made.

    Raises:
        ValueError: An unknown name, a package that is missing, arguments that the optimizer does not take, one that
            cannot be divided among processes, or one that steps otherwise than from gradients (LBFGS, SparseAdam).
    """
    # Whole, because processes may not be connected yet; a matrix, because Muon takes nothing else.
    whole, weight = replace(config, shard_optimizer=False), nn.Parameter(torch.zeros(1, 1))
    weight.grad = torch.zeros_like(weight)
    optimizer = make_optimizer(whole, [weight], config.learning_rate)
    if config.optimizer.lower() not in OTHER_PACKAGES:  # those may step on a GPU alone
        try:
            optimizer.step()
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{type(optimizer).__name__} needs more for a step than gradients ({error}): take another optimizer, "
                "such as AdamW."
            ) from error
    if config.shard_optimizer and config.optimizer.lower() in OTHER_PACKAGES:
        raise ValueError(
            f"shard_optimizer divides optimizers of torch.optim, parameter by parameter; {config.optimizer} is none."
        )
    make_schedule(config, optimizer, 1)


def check_parameters(config: DistillConfig, parameters: Iterable[nn.Parameter]) -> None:
    """Raise if the optimizer does not take parameters of these shapes: Muon takes matrices, and no biases."""
    shapes = [nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in parameters]
    if config.optimizer.lower() not in OTHER_PACKAGES:
        make_optimizer(replace(config, shard_optimizer=False), shapes, config.learning_rate)


def make_optimizer(config: DistillConfig, parameters: Iterable[nn.Parameter], learning_rate: float) -> Any:
    """The optimizer of a configuration. Weight decay is 0 unless `optimizer_arguments` say otherwise.

    With `shard_optimizer` it is divided among the processes, which have to be connected.
    """
    kind = _optimizer_class(config.optimizer)
    arguments = {"lr": learning_rate, **config.optimizer_arguments}
    if "weight_decay" in inspect.signature(kind).parameters:
        arguments.setdefault("weight_decay", 0.0)
    try:
        if config.shard_optimizer:
            from diffusers_linattn.training.zero import DividedOptimizer

            return DividedOptimizer(parameters, kind, **arguments)
        return kind(parameters, **arguments)
    except TypeError as error:
        given = ", ".join(sorted(arguments))
        raise ValueError(f"{kind.__name__} does not take these arguments ({given}): {error}.") from error


def make_schedule(config: DistillConfig, optimizer: Any, steps: int) -> Any:
    """The learning-rate schedule of one stage of `steps` optimizer steps."""
    known = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
    if config.lr_scheduler not in known:
        raise ValueError(f"Unknown lr_scheduler {config.lr_scheduler!r}: expected one of {', '.join(known)}.")
    return get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=max(steps, 1)
    )


def _optimizer_class(name: str) -> Any:
    if name.lower() in OTHER_PACKAGES:
        module, kind, package = OTHER_PACKAGES[name.lower()]
        try:
            return getattr(importlib.import_module(module), kind)
        except ImportError as error:
            raise ValueError(f"The optimizer {name} needs {package}: pip install {package}.") from error
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)]
    found = {kind.__name__.lower(): kind for kind in kinds if issubclass(kind, torch.optim.Optimizer)}
    del found["optimizer"]  # what they have in common
    if name.lower() not in found:
        names = sorted(kind.__name__ for kind in found.values())
        raise ValueError(f"Unknown optimizer {name!r}: expected one of {', '.join([*names, *OTHER_PACKAGES])}.")
    return found[name.lower()]
