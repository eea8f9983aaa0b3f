"""What surrounds a training run: the accelerator, and the options of the model that save memory or time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffusers_linattn.training.config import DistillConfig


@contextmanager
def accelerator_for(model: Any, config: DistillConfig, directory: Path) -> Iterator[Accelerator]:
    """The accelerator of one run. Its process-wide state is taken down again unless it was there before.

    Raises:
        ValueError: fp16 on a CPU, or a precision other than that of an accelerator which the process has already.
    """
    precision = config.mixed_precision
    if precision is None:
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "no")
    on_cpu = model.device.type == "cpu"
    if precision == "fp16" and on_cpu:
        raise ValueError("fp16 cannot be trained on a CPU: move the pipeline to a GPU, or load it in bf16 or fp32.")
    was_there = bool(AcceleratorState._shared_state)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=on_cpu,
            log_with=list(config.report_to) or None,
            project_dir=directory,
        )
        yield accelerator
    finally:
        if not was_there:  # a second run may be in another precision
            AcceleratorState._reset_state()


def start_trackers(accelerator: Accelerator, config: DistillConfig) -> None:
    """Start the trackers of `report_to` with the settings, where what is not a number is written as text."""
    if config.report_to:
        settings = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for name, value in asdict(config).items()
        }
        accelerator.init_trackers("diffusers-linattn", config=settings)


@contextmanager
def model_options(model: Any, config: DistillConfig) -> Iterator[None]:
    """Gradient checkpointing and compiled blocks, while the context lasts.

    Raises:
        ValueError: The model does not have what is asked for.
    """
    checkpointing = config.gradient_checkpointing and not getattr(model, "is_gradient_checkpointing", False)
    if checkpointing and not getattr(model, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} does not support gradient_checkpointing.")
    if config.compile and not getattr(model, "_repeated_blocks", None):
        raise ValueError(f"{type(model).__name__} names no repeated blocks: compile=True needs them.")
    try:
        if checkpointing:
            model.enable_gradient_checkpointing()
        if config.compile:
            model.compile_repeated_blocks(dynamic=True)  # samples differ in size
        yield
    finally:
        if checkpointing:
            model.disable_gradient_checkpointing()
        if config.compile:
            for module in model.modules():
                if type(module).__name__ in model._repeated_blocks:
                    module._compiled_call_impl = None
