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
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType
from filelock import FileLock, Timeout

from diffusers_linattn.training.config import DistillConfig


LOCK_NAME = ".training.lock"
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@contextmanager
def sole_trainer(directory: Path) -> Iterator[None]:
    """Keeps other processes from training into a directory. The lock dies with its process.

    Raises:
        ValueError: Another process trains into it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_NAME
    try:
        held = FileLock(path).acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"output_dir {directory}: another run is training into it. Wait for its end, or give another output_dir."
        ) from None
    with held:
        try:
            yield
        finally:
            path.unlink()


@contextmanager
def accelerator_for(model: Any, config: DistillConfig, directory: Path | None) -> Iterator[Accelerator]:
    """The accelerator of one run. The process-wide states behind it are put back as they were.

    Raises:
        ValueError: A precision that cannot be trained in, another one than that of an accelerator which the process
            has already, sharded parameters, an optimizer to be divided among one process, or gradients that the
            launcher accumulates otherwise.
    """
    states = (AcceleratorState, GradientState, PartialState)
    before = [dict(state._shared_state) for state in states]
    if not before[0] and before[2].get("num_processes", 1) == 1:
        PartialState._shared_state.clear()  # an earlier one may have chosen another device than the model's
    try:
        accelerator = Accelerator(
            mixed_precision=_precision(model, config, before[0]),
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=model.device.type == "cpu",
            log_with=list(config.report_to) or None,
            project_dir=directory,
        )
        if accelerator.distributed_type in SHARDED:
            raise ValueError(
                f"Launched with {accelerator.distributed_type.value}, which shards parameters: the teacher's weights "
                "are switched in whole. Launch it as plain data parallelism; shard_optimizer=True and "
                "trainable='lora' save memory."
            )
        if config.shard_optimizer and accelerator.num_processes == 1:
            raise ValueError("shard_optimizer=True divides among processes, and there is only this one: leave it out.")
        if accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
            raise ValueError(
                f"The launcher sets gradient_accumulation_steps to {accelerator.gradient_accumulation_steps}, the "
                f"settings say {config.gradient_accumulation_steps}: leave it out there."
            )
        yield accelerator
    finally:
        alone = PartialState._shared_state.get("num_processes", 1) == 1
        for state, kept in zip(states, before, strict=True):
            if state is PartialState and not alone:  # its process group lives on
                continue
            state._shared_state.clear()
            state._shared_state.update(kept)


def _precision(model: Any, config: DistillConfig, running: dict[str, Any]) -> str:
    own = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "no")
    precision = config.mixed_precision or own
    if precision == "fp16" and model.device.type == "cpu":
        raise ValueError("fp16 cannot be trained on a CPU: move the pipeline to a GPU, or load it in bf16 or fp32.")
    if precision != own and own != "no":
        raise ValueError(
            f"mixed_precision={precision!r} does not go with a model in {own}, whose weights stay so: leave it out, "
            "or load the model in fp32."
        )
    known = running.get("_mixed_precision", precision)
    if known != precision:
        raise ValueError(
            f"This process has an Accelerator with mixed_precision={known!r} already, which training in {precision!r} "
            "cannot share: make it with the same, or train before it is made."
        )
    return precision


def check_trackers(config: DistillConfig) -> None:
    """Raise unless all trackers that are asked for are installed."""
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in config.report_to if name not in available]
    if missing:
        there = ", ".join(sorted(available)) or "none"
        raise ValueError(f"report_to has {', '.join(missing)}, which accelerate does not find; installed: {there}.")


@contextmanager
def trackers(accelerator: Accelerator, config: DistillConfig) -> Iterator[None]:
    """Within this context the trackers of `report_to` run; settings that are no numbers are written as text."""
    if config.report_to:
        settings = {
            name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for name, value in asdict(config).items()
        }
        accelerator.init_trackers("diffusers-linattn", config=settings)
    try:
        yield
    finally:
        # Not end_training(): that would end the caller's process group too.
        for tracker in accelerator.trackers:
            tracker.finish()


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
    blocks = [
        part for part in model.modules() if type(part).__name__ in (getattr(model, "_repeated_blocks", None) or ())
    ]
    compiled = [block for block in blocks if config.compile and block._compiled_call_impl is None]
    try:
        if checkpointing:
            model.enable_gradient_checkpointing()
        for block in compiled:
            block.compile(dynamic=True)  # samples differ in size
        yield
    finally:
        if checkpointing:
            model.disable_gradient_checkpointing()
        for block in compiled:
            block._compiled_call_impl = None
