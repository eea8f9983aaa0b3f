"""Measure how long the students of compare_students.py take to train, on a machine that does nothing else.

    python examples/glyphs/time_students.py --teacher flux --results docs/results/flux --work students

Replaces `training_seconds` of each student in students.json by the median seconds of a few steps times the steps of
each stage, and of the choice of layers where there was one. Loading, samples and pictures are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compare_students import STUDENTS
from teachers import TEACHERS

from diffusers_linattn import distill, linearize
from diffusers_linattn.files import write_json
from diffusers_linattn.samples import Samples


TIMED = 4  # steps of a stage, after the first


def seconds_per_step(
    teacher: str, name: str, row: dict[str, Any], samples: Samples, directory: Path
) -> dict[str, float]:
    """Of each stage that the student trained in."""
    student, pipe = STUDENTS[name], TEACHERS[teacher].load()
    linearize(pipe, student.processor, layers=row.get("layers"))
    options = row["options"] | {stage: min(row["options"][stage], TIMED + 1) for stage in ("transfer_steps", "steps")}
    shutil.rmtree(directory, ignore_errors=True)
    distill(pipe, samples, directory, **options)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(directory)
    stages = dict.fromkeys(line["stage"] for line in lines)
    return {stage: median([line["seconds"] for line in lines if line["stage"] == stage][1:]) for stage in stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", choices=TEACHERS, required=True)
    parser.add_argument("--results", type=Path, required=True, help="folder of students.json")
    parser.add_argument("--work", type=Path, default=Path("students"), help="folder of the samples")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    samples = Samples(arguments.work / arguments.teacher / "samples")
    rows = json.loads((arguments.results / "students.json").read_text())
    for name in [name for name in STUDENTS if name in rows]:
        row = rows[name]
        each = seconds_per_step(arguments.teacher, name, row, samples, arguments.work / "timed")
        steps = {"transfer": row["options"]["transfer_steps"], "end_to_end": row["options"]["steps"]}
        seconds = sum(each[stage] * steps[stage] for stage in each)
        # The choice trains all layers, about twice as many.
        seconds += row.get("choice_steps", 0) * 2 * each.get("transfer", 0)
        row |= {"training_seconds": round(seconds, 1), "training_threads": torch.get_num_threads()}
        print(f"{name}: {seconds:.0f} s", flush=True)
        write_json(arguments.results / "students.json", rows)


if __name__ == "__main__":
    main()
