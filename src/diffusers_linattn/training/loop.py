"""The training loop: phases of steps with accelerate, that can stop at any step and go on exactly."""

from __future__ import annotations

import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm.auto import tqdm

from diffusers_linattn.files import write_atomically
from diffusers_linattn.samples import Samples
from diffusers_linattn.training.checkpoints import (
    TrainedWeights,
    find_checkpoints,
    read_position,
    remove_checkpoints_after,
    write_checkpoint,
)
from diffusers_linattn.training.config import DistillConfig
from diffusers_linattn.training.objective import Objective, draw
from diffusers_linattn.training.optimizers import make_optimizer, make_schedule
from diffusers_linattn.training.phases import Phase
from diffusers_linattn.training.teacher_student import TrainingBatch
from diffusers_linattn.training.trainable import dtype_of


METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
Row = dict[str, Any]
_START: Mapping[str, Any] = {"phase": 0, "step": 0, "global_step": 0}


class DivergedError(ValueError):
    """The loss is NaN or infinite."""


@dataclass(frozen=True)
class Running:
    """A phase that is being run, as accelerate has prepared it."""

    number: int
    phase: Phase
    stage: Any
    optimizer: Any
    schedule: Any
    average: Any


class Loop:
    """Runs phases one after the other.

    Args:
        accelerator: Says how many processes there are and averages their gradients.
        config: The settings.
        samples: What is trained on.
        objective: How samples become noisy latents.
        model: The transformer.
        parameters: All that is trained, by name.
        directory: Where checkpoints and metrics go; `None` writes nothing, and the run cannot be gone on with.
        validate: Called with the step after every `validation_steps` steps; what it returns is logged.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: DistillConfig,
        samples: Samples,
        objective: Objective,
        model: Any,
        parameters: Mapping[str, nn.Parameter],
        directory: Path | None,
        validate: Callable[[int], Mapping[str, float]] | None = None,
    ):
        self.accelerator, self.config, self.samples, self.objective = accelerator, config, samples, objective
        self.parameters, self.directory, self.validate = dict(parameters), directory, validate
        self.dtype = dtype_of(model, parameters)
        # A process by itself trains where the user has put the model, one of several on its own device.
        self.device = accelerator.device if accelerator.num_processes > 1 else model.device
        self.rows: list[Row] = []
        self._stop_signal = 0
        self._is_last = False

    def run(self, phases: Sequence[Phase], checkpoint: Path | None) -> list[Row]:
        """Run all phases, or what is left of them after `checkpoint`. Returns one row of metrics per step."""
        position = _START if checkpoint is None else read_position(checkpoint)
        if checkpoint is not None and self.accelerator.is_main_process:
            remove_checkpoints_after(checkpoint)
        self.rows = self._read_rows(position["global_step"])
        with self._stopping_at_signals():
            for number, phase in enumerate(phases):
                if number < position["phase"]:
                    continue
                self._is_last = number == len(phases) - 1
                resumed = number == position["phase"] and checkpoint is not None
                self._run_phase(number, phase, position if resumed else _START, checkpoint if resumed else None)
            # One that came while the last checkpoint was being written.
            if stopping := self._stopped():
                self._stop(stopping)
        return self.rows

    def _run_phase(self, number: int, phase: Phase, position: Mapping[str, Any], checkpoint: Path | None) -> None:
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in phase.parameters)
        move = self.accelerator.num_processes > 1  # by itself, the model stays where the user has put it
        stage = self.accelerator.prepare(phase.stage, device_placement=[move])
        # What is as large as the parameters is made where they are by now, so that nothing of it has to be moved.
        trained = list(phase.parameters.values())
        average = EMAModel(trained, decay=self.config.ema_decay, foreach=True) if self.config.ema_decay else None
        optimizer = make_optimizer(self.config, trained, phase.learning_rate)
        schedule = make_schedule(self.config, optimizer, phase.steps)
        optimizer = self.accelerator.prepare(optimizer, device_placement=[False])
        averages = {} if average is None else dict(zip(phase.parameters, average.shadow_params, strict=True))
        weights = TrainedWeights(self.accelerator, self.parameters, averages)
        try:
            if checkpoint is not None:
                with _random_state_kept():
                    self.accelerator.load_state(str(checkpoint))
                schedule.load_state_dict(position["schedule"])
                if average is not None:
                    average.optimization_step = position["step"]
            self._run_steps(Running(number, phase, stage, optimizer, schedule, average), position["step"])
            if average is not None:
                average.copy_to(trained)
        finally:
            weights.remove()
            self.accelerator.free_memory()

    def _run_steps(self, running: Running, first: int) -> None:
        phase, optimizer, schedule = running.phase, running.optimizer, running.schedule
        progress = tqdm(
            range(first, phase.steps),
            desc=phase.name.replace("_", " "),
            initial=first,
            total=phase.steps,
            disable=not self.accelerator.is_main_process,
        )
        for step in progress:
            started = time.perf_counter()
            losses = self._accumulate(running, step)
            if phase.name == "end_to_end" and self.config.max_grad_norm is not None:
                self.accelerator.clip_grad_norm_(phase.parameters.values(), self.config.max_grad_norm)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if running.average is not None:
                running.average.step(list(phase.parameters.values()))
            self._log(phase.name, {**losses, "learning_rate": rate}, time.perf_counter() - started)
            progress.set_postfix(loss=f"{losses['loss']:.4f}")
            self._after_step(running, step)

    def _after_step(self, running: Running, step: int) -> None:
        done = len(self.rows)
        if self.validate and self.config.validation_steps and done % self.config.validation_steps == 0:
            self._validate(running)
        stopping = self._stopped()  # perhaps while the pictures were drawn
        at_the_end = self._is_last and step + 1 == running.phase.steps
        due = done % self.config.checkpointing_steps == 0 or at_the_end or stopping
        if due and self.directory is not None:
            self._check_weights()
            position = {
                "phase": running.number,
                "step": step + 1,
                "global_step": done,
                "schedule": running.schedule.state_dict(),
            }
            limit = self.config.checkpoints_total_limit
            write_checkpoint(self.accelerator, self.directory, done, position, limit)
        if stopping:
            self._stop(stopping)

    def _check_weights(self) -> None:
        """A checkpoint of weights that are not finite would be gone on from."""
        bad = [name for name, parameter in self.parameters.items() if not parameter.isfinite().all()]
        if bad:
            self._report_divergence(f"{len(bad)} trained weights, such as {bad[0]},")

    def _accumulate(self, running: Running, step: int) -> dict[str, float]:
        """The gradients of one step, over all batches and processes, and its mean losses."""
        sums: dict[str, torch.Tensor] = {}
        parts = self.config.gradient_accumulation_steps
        for part in range(parts):
            batch = self._batch(running.number, step, part)
            with self.accelerator.accumulate(running.stage):
                losses = running.stage(batch)
                self.accelerator.backward(losses.pop("total"))
            for name, loss in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(loss)) + loss.detach().float() / parts
        # One transfer from the device for all.
        values = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="mean")
        means = dict(zip(sums, values.tolist(), strict=True))
        bad = [name for name, value in means.items() if not math.isfinite(value)]
        if bad:
            self._report_divergence(f"The loss ({', '.join(bad)})")
        return means

    def _report_divergence(self, what: str) -> None:
        found = find_checkpoints(self.directory) if self.directory else []
        kept = f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."
        raise DivergedError(
            f"{what} is not finite at step {len(self.rows) + 1}. {kept} Lower the learning rate, or look for NaN in "
            "the samples; another recipe needs another output_dir."
        )

    def _batch(self, number: int, step: int, part: int) -> TrainingBatch:
        # Each step's draws depend on its own number alone, so that a resumed run draws what an unbroken one would;
        # and each sample's on its place in the whole batch, however that is split over processes and parts.
        config, processes = self.config, self.accelerator.num_processes
        key = f"{config.seed}/{number}/{step}"
        generator = random.Random(key)
        whole = config.batch_size * processes * config.gradient_accumulation_steps
        groups = self.samples.groups
        group = generator.choices(groups, [len(group) for group in groups])[0]
        indices = generator.choices(group, k=whole)
        dropped = self._dropped_prompts(generator, indices)
        first = (part * processes + self.accelerator.process_index) * config.batch_size
        places = range(first, first + config.batch_size)
        batch = self.samples.batch([indices[i] for i in places], [dropped[i] for i in places])
        generators = [torch.Generator().manual_seed(random.Random(f"{key}/{i}").getrandbits(60)) for i in places]
        latents = batch.latents.float()
        drawn = draw(latents, generators, places, whole, config.timestep_sampling)
        timesteps = self.objective.timesteps(drawn.level)
        noisy = self.objective.noisy(latents, drawn.noise, timesteps)
        target = self.objective.target(latents, drawn.noise, timesteps)
        ready = replace(batch, latents=noisy).to(self.device, self.dtype)
        return TrainingBatch(ready.latents, timesteps.to(self.device), target.to(self.device), ready.arguments)

    def _dropped_prompts(self, generator: random.Random, indices: Sequence[int]) -> list[bool]:
        """Which samples of a batch are trained without their prompt: each by itself, or all where shapes differ."""
        drops = [generator.random() < self.config.prompt_dropout for _ in indices]
        if any(drops) and not all(self.samples.null_fits(index) for index in indices):
            return [drops[0]] * len(indices)
        return drops

    def _validate(self, running: Running) -> None:
        assert self.validate is not None
        parameters, average = list(running.phase.parameters.values()), running.average
        if average is not None:
            average.store(parameters)
            average.copy_to(parameters)
        try:
            values = self.validate(len(self.rows)) if self.accelerator.is_main_process else {}
        finally:
            if average is not None:
                average.restore(parameters)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and self.directory is not None:
            _append(self.directory / VALIDATION_NAME, {"step": len(self.rows), **values})
        self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, step=len(self.rows))

    def _log(self, stage: str, values: Mapping[str, float], seconds: float) -> None:
        step = len(self.rows) + 1
        row: Row = {"step": step, "stage": stage, **values}
        self.rows.append(row)
        if self.accelerator.is_main_process and self.directory is not None:
            _append(self.directory / METRICS_NAME, {**row, "seconds": round(seconds, 4)})
        self.accelerator.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def _read_rows(self, steps: int) -> list[Row]:
        """The rows of the steps that are not repeated; the files are cut after them."""
        if self.directory is None:
            return []
        rows = _read(self.directory / METRICS_NAME, steps)
        validations = _read(self.directory / VALIDATION_NAME, steps)
        if len(rows) < steps:
            raise ValueError(
                f"{self.directory / METRICS_NAME} has {len(rows)} steps, the checkpoint {steps}: it is of another run."
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for name, kept in ((METRICS_NAME, rows), (VALIDATION_NAME, validations)):
                text = "".join(f"{json.dumps(row)}\n" for row in kept)
                if kept or name == METRICS_NAME:
                    _write(self.directory / name, text)
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    @contextmanager
    def _stopping_at_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step, with a checkpoint."""
        if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
            yield
            return

        def note(number: int, _: FrameType | None) -> None:
            if self._stop_signal:  # asked twice
                raise KeyboardInterrupt
            self._stop_signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stopped(self) -> int:
        """The signal that some process has got, 0 if none has."""
        if self.accelerator.num_processes == 1:
            return self._stop_signal
        flag = torch.tensor([self._stop_signal], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())

    def _stop(self, number: int) -> None:
        message = "Stopped by a signal."
        if self.directory is not None:
            message += f" The same call goes on from {find_checkpoints(self.directory)[-1]}."
        self.accelerator.print(message)
        if number == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(message)


def check_batch(samples: Samples, config: DistillConfig, accelerator: Accelerator) -> None:
    """Raise if there are fewer samples than a step takes."""
    size = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    if len(samples) < size:
        raise ValueError(
            f"{samples.directory} holds {len(samples)} samples, too few for batches of {size}: make more, or lower "
            "batch_size."
        )


def prompt_dropout_of(model: Any, samples: Samples, config: DistillConfig) -> float:
    """The share of samples trained without their prompt: only models that are guided by two predictions need it."""
    given, plan = samples.manifest["settings"]["call_arguments"], samples.manifest["plan"]
    scale = given.get("guidance_scale")
    # Where there is a true_cfg_scale, guidance_scale is an input of the model or nothing.
    has_scale = "true_cfg_scale" not in plan["without_guidance"] and not getattr(
        model.config, "guidance_embeds", False
    )
    by_scale = has_scale and (scale is None or scale > 1)
    by_negative_prompt = given.get("true_cfg_scale", 1.0) > 1
    return config.prompt_dropout if samples.has_null and (by_scale or by_negative_prompt) else 0.0


def _append(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _read(path: Path, steps: int) -> list[Row]:
    """The rows of a file up to a step; a last line that a killed process left half written is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["step"] <= steps]


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The global random states, which loading a checkpoint sets, are the user's: nothing here draws from them."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
