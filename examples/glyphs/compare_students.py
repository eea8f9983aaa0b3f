"""Distil many students from one glyph teacher at the same budget, and put them in one table.

    python examples/glyphs/compare_students.py --teacher flux --output docs/results/flux
    python examples/glyphs/compare_students.py --teacher flux --output docs/results/flux --only "hybrid 4" "window 4"

Every student is kept when it is done (a line of students.json and a row of pictures), so that the command can be
stopped and called again. The same samples, pictures, seeds and number of steps for all; what a student changes stands
beside it in STUDENTS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from judge import Judge
from teachers import PROMPTS, TEACHERS, letter_of

from diffusers_linattn import (
    ClearProcessor,
    GLAProcessor,
    HybridProcessor,
    LinearProcessor,
    choose_layers,
    distill,
    evaluate,
    linearize,
    make_samples,
)
from diffusers_linattn.files import write_json
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.processors import BaseProcessor
from diffusers_linattn.samples import Samples


SAMPLES, BATCH, PICTURES, INFERENCE_STEPS = 416, 16, 104, 20
STEPS = 100  # of the transfer, and as many end to end
SHOWN = 8  # pictures in the sheet
# The teachers were never trained without a prompt.
TRAINING = {"transfer_learning_rate": 1e-3, "learning_rate": 6e-4, "prompt_dropout": 0.0}
FASTER = {"transfer_learning_rate": 3e-3}
CHOICE_STEPS = 50


@dataclass(frozen=True)
class Student:
    """What is put into the teacher, in which layers, and what differs in its training."""

    processor: BaseProcessor
    layers: str = "all"  # or "chosen half", "every second"
    options: dict[str, Any] = field(default_factory=dict)


STUDENTS = {
    "hybrid 4": Student(HybridProcessor(window=4)),
    "window 4": Student(ClearProcessor(window=4)),
    "linear relu": Student(LinearProcessor()),
    "hybrid 2": Student(HybridProcessor(window=2)),
    "window 2": Student(ClearProcessor(window=2)),
    "linear hedgehog": Student(LinearProcessor(feature_map="hedgehog")),
    "linear relu, chosen half": Student(LinearProcessor(), "chosen half"),
    "linear relu, every second layer": Student(LinearProcessor(), "every second"),
    "window 4, pooled by 4": Student(ClearProcessor(window=4, down_factor=4)),
    "window 2, pooled by 4": Student(ClearProcessor(window=2, down_factor=4)),
    "gated": Student(GLAProcessor()),
    "linear softmax": Student(LinearProcessor(feature_map="softmax")),
    "linear relu, projections reset": Student(LinearProcessor(reset_projections=True)),
    "linear relu, transfer only": Student(LinearProcessor(), options={"transfer_steps": 2 * STEPS, "steps": 0}),
    "linear relu, end to end only": Student(LinearProcessor(), options={"transfer_steps": 0, "steps": 2 * STEPS}),
    "linear relu, LoRA of rank 16": Student(LinearProcessor(), options={"trainable": "lora", "rank": 16}),
    "hybrid 4, faster transfer": Student(HybridProcessor(window=4), options=FASTER),
    "linear hedgehog, faster transfer": Student(LinearProcessor(feature_map="hedgehog"), options=FASTER),
}


def convert(pipe: Any, student: Student, samples: Samples) -> dict[str, Any]:
    """Put the student's attention into the pipeline; returns what is worth noting about the choice of layers."""
    names = [layer.name for layer in layers_of(pipe)]
    if student.layers == "every second":
        linearize(pipe, student.processor, layers=list(range(0, len(names), 2)))
        return {"layers": names[::2]}
    if student.layers == "chosen half":
        choice = choose_layers(
            pipe, student.processor, samples, keep=0.5, steps=CHOICE_STEPS, batch_size=BATCH, **TRAINING
        )
        linearize(pipe, choice.mapping)
        return {"layers": choice.layers, "layer_losses": choice.losses, "choice_steps": CHOICE_STEPS}
    linearize(pipe, student.processor)
    return {}


def train(pipe: Any, student: Student, samples: Samples, directory: Path) -> dict[str, Any]:
    """Distil a converted pipeline; the losses at the end, and the seconds it took."""
    shutil.rmtree(directory, ignore_errors=True)
    options = {"transfer_steps": STEPS, "steps": STEPS, "batch_size": BATCH, **TRAINING, **student.options}
    started = time.perf_counter()
    curves = distill(pipe, samples, directory, **options)
    seconds = time.perf_counter() - started
    shutil.rmtree(directory)
    last = {f"{name}_loss": fmean(row["loss"] for row in rows[-20:]) for name, rows in curves.items() if rows}
    return {**last, "training_seconds": round(seconds, 1), "options": options}


class Experiment:
    """The students of one teacher, with what they share: samples, pictures of the teacher, the judge."""

    def __init__(self, teacher: str, output: Path, work: Path):
        self.teacher, self.output, self.work = TEACHERS[teacher], output, work / teacher
        self.call = self.teacher.call(INFERENCE_STEPS)
        self.judge = Judge.load()
        self.path = output / "students.json"
        self.rows: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.reference: Any = None

    def score(self, images: torch.Tensor, prompts: list[Any]) -> dict[str, float]:
        return self.judge.score(images, [letter_of(prompt) for prompt in prompts])

    def evaluate(self, pipe: Any, name: str, **options: Any) -> dict[str, dict[str, float]]:
        """The table of one pipeline; its first pictures are kept for the sheet."""
        asked = [PROMPTS[i % len(PROMPTS)] for i in range(PICTURES)]
        result = evaluate(
            pipe,
            asked,
            name=name,
            reference=self.reference,
            batch_size=26,
            metrics=[self.score],
            call_arguments=self.call,
            **options,
        )
        self.reference = result.reference
        for row, pictures in result.pictures.items():
            self.work.mkdir(parents=True, exist_ok=True)
            torch.save(pictures.stills[:SHOWN].clone(), self.work / f"{row}.pt")
        return result.rows

    def keep(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.rows)

    def samples(self) -> Samples:
        call = dict(self.call)
        resolution = (call.pop("height"), call.pop("width"))
        return make_samples(
            self.teacher.load(),
            PROMPTS,
            self.work / "samples",
            num_samples=SAMPLES,
            batch_size=26,
            resolutions=[resolution],
            guidance_scale=call.pop("guidance_scale"),
            num_inference_steps=call.pop("num_inference_steps"),
            call_arguments=call,
        )

    def run(self, names: list[str]) -> None:
        samples = self.samples()
        for name in [name for name in names if name not in self.rows]:
            student, pipe = STUDENTS[name], self.teacher.load()
            if student.options.get("trainable") == "lora" and not hasattr(pipe.transformer, "add_adapter"):
                print(f"{name}: left out, {type(pipe.transformer).__name__} takes no LoRAs in diffusers", flush=True)
                continue
            print(f"\n{name}", flush=True)
            noted = convert(pipe, student, samples)
            untrained = f"untrained: {student.processor!r}, {student.layers}"
            first = self.reference is None
            if first or untrained not in self.rows:
                table = self.evaluate(pipe, "untrained", other_seed=first)
                if first:
                    self.keep("teacher", table["reference"])
                    self.keep("teacher, other seeds", table["reference, other seed"])
                self.keep(untrained, table["untrained"])
            trained = train(pipe, student, samples, self.work / "student")
            result = self.evaluate(pipe, name)[name]
            machine = {
                "training_threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
            self.keep(name, {**result, "untrained": untrained, **noted, **trained, **machine})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=TEACHERS, default="flux")
    parser.add_argument("--output", type=Path, required=True, help="folder of students.json")
    parser.add_argument("--work", type=Path, default=Path("students"), help="folder of samples and pictures")
    parser.add_argument("--only", nargs="+", choices=STUDENTS, default=list(STUDENTS), metavar="STUDENT")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    Experiment(arguments.teacher, arguments.output, arguments.work).run(arguments.only)


if __name__ == "__main__":
    main()
