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
# Schedules of diffusers that take more than steps and warm-up, and those that have no warm-up.
SCHEDULE_ARGUMENTS = {"piecewise_constant": "step_rules", "cosine_with_restarts": "num_cycles", "polynomial": "power"}
WITHOUT_WARMUP = ("constant", "piecewise_constant")


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
    name, given = config.lr_scheduler, dict(config.lr_scheduler_arguments)
    known = [kind.value for kind in SchedulerType]
    if name not in known:
        raise ValueError(f"Unknown lr_scheduler {name!r}: expected one of {', '.join(known)}.")
    taken = SCHEDULE_ARGUMENTS.get(name)
    if given.keys() - {taken}:
        raise ValueError(
            f"lr_scheduler_arguments are {given}, but lr_scheduler {name!r} takes {taken or 'none'}: leave the others "
            "out."
        )
    if name == SchedulerType.PIECEWISE_CONSTANT.value and "step_rules" not in given:
        raise ValueError(
            f"lr_scheduler {name!r} needs lr_scheduler_arguments={{'step_rules': '1:100,0.1'}}: factors of the "
            "learning rate with the steps up to which they hold, and the last factor."
        )
    if config.lr_warmup_steps and name in WITHOUT_WARMUP:
        raise ValueError(f"lr_scheduler {name!r} has no warm-up: leave lr_warmup_steps out, or take another schedule.")
    steps = max(steps, 1)
    try:
        return get_scheduler(
            name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=steps, **given
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"lr_scheduler {name!r} does not take {given}: {error}.") from error


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
