"""Write the table and the sheet of pictures of what compare_students.py has measured.

    python examples/glyphs/students_page.py --results docs/results/flux --work students/flux

"Gap closed" is how much of the way from the untrained swap to the teacher on other seeds a student has gone, where
that is more than 0.1; the teacher on the same seeds as the students is the other teacher row. "Minutes" is the
training alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from compare_students import STUDENTS

from diffusers_linattn.evaluation.report import make_grid


COLUMNS = {
    "transfer_loss": ("transfer loss", "{:.3f}"),
    "latent_mse": ("latent MSE", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "agreement": ("agreement", "{:.3f}"),
    "frechet": ("Fréchet", "{:.1f}"),
    "gap_accuracy": ("gap closed, accuracy", "{:.0%}"),
    "gap_agreement": ("gap closed, agreement", "{:.0%}"),
    "minutes": ("minutes", "{:.1f}"),
}
TEACHERS = ("teacher", "teacher, other seeds")


def rows_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the table in the order of STUDENTS, each student after its untrained swap."""
    rows = {name: found[name] for name in TEACHERS if name in found}
    for name in [name for name in STUDENTS if name in found]:
        row, swap = dict(found[name]), found[found[name]["untrained"]]
        for measure in ("accuracy", "agreement"):
            gap = found["teacher, other seeds"][measure] - swap[measure]
            if gap > 0.1:
                row[f"gap_{measure}"] = (row[measure] - swap[measure]) / gap
        row["minutes"] = row["training_seconds"] / 60
        if not any(shown is swap for shown in rows.values()):
            rows[f"*{name}, untrained*"] = swap
        rows[name] = row
    return rows


def to_markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|---" + "|---:" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        cells = [form.format(row[key]) if key in row else "–" for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of students.json")
    parser.add_argument("--work", type=Path, help="folder of the pictures; without it no sheet is drawn")
    arguments = parser.parse_args()
    rows = rows_of(json.loads((arguments.results / "students.json").read_text()))
    (arguments.results / "students.md").write_text(to_markdown(rows))
    print(to_markdown(rows))
    if arguments.work is not None:
        named = {"teacher": "reference", "teacher, other seeds": "reference, other seed"}
        files = {name: arguments.work / f"{named.get(name, name)}.pt" for name in rows}
        pictures = {name: torch.load(file, weights_only=True) for name, file in files.items() if file.exists()}
        labels = [f"the letter {chr(ord('A') + place)}" for place in range(8)]
        make_grid(pictures, labels).convert("L").save(arguments.results / "students.png", optimize=True)


if __name__ == "__main__":
    main()
