"""The result of an evaluation: its table, and the files that it is kept in."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusers_linattn.evaluation.metrics import as_text
from diffusers_linattn.evaluation.pictures import Pictures
from diffusers_linattn.files import as_read_back, nearest_existing, read_json, write_atomically, write_json


REFERENCE = "reference"
OTHER_SEED = "reference, other seed"
HEADINGS = {
    "latent_mse": "latent MSE",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "clip": "CLIP score",
    "fid": "FID",
}
RESULT_NAME, TABLE_NAME, GRID_NAME = "evaluation.json", "evaluation.md", "grid.png"
IDENTITY = ("prompts", "seeds", "call_arguments", "pipelines")  # one evaluation is another than one that differs here
CELL = 256  # pixels of a picture in the grid, at most
COLUMNS = 8


@dataclass(frozen=True)
class Evaluation:
    """How close pipelines are to a reference, on the same seeds.

    Args:
        rows: For each pipeline its numbers by name; the first row is the reference.
        pictures: For each row, what it drew.
        settings: What was compared, with which versions: JSON.

    Example:
        >>> print(result.to_markdown())  # doctest: +SKIP
        >>> result.save("evaluation/")  # doctest: +SKIP
    """

    rows: dict[str, dict[str, float]]
    pictures: dict[str, Pictures]
    settings: dict[str, Any]

    @property
    def reference(self) -> Pictures:
        """The pictures of the reference, to compare further pipelines with: `evaluate(..., reference=this)`."""
        return self.pictures[REFERENCE]

    @classmethod
    def join(cls, evaluations: Mapping[str, Evaluation]) -> Evaluation:
        """Several pipelines that were compared with the same reference, in one table.

        Args:
            evaluations: By the name that the row of each pipeline gets.

        Raises:
            ValueError: References that differ, or a name twice.

        Example:
            >>> swapped = evaluate(pipe, prompts)  # doctest: +SKIP
            >>> trained = evaluate(student, reference=swapped.reference)  # doctest: +SKIP
            >>> Evaluation.join({"swapped": swapped, "distilled": trained}).save("evaluation/")  # doctest: +SKIP
        """
        if not evaluations:
            raise ValueError("There is no evaluation to join.")
        first = next(iter(evaluations.values()))
        rows, pictures = {REFERENCE: first.rows[REFERENCE]}, {REFERENCE: first.reference}
        pipelines = {}
        for name, evaluation in evaluations.items():
            if not _same(first.reference, evaluation.reference):
                raise ValueError(
                    f"{name!r} was compared with other pictures than {next(iter(evaluations))!r}: give the first's "
                    "reference to the other evaluations (reference=first.reference)."
                )
            if name in (REFERENCE, OTHER_SEED):
                raise ValueError(f"{name!r} is the name of another row: choose a different one.")
            student = next(row for row in evaluation.rows if row not in (REFERENCE, OTHER_SEED))
            rows[name], pictures[name] = evaluation.rows[student], evaluation.pictures[student]
            pipelines[name] = evaluation.settings["pipelines"][student]
        for evaluation in evaluations.values():
            if OTHER_SEED in evaluation.rows:
                rows[OTHER_SEED], pictures[OTHER_SEED] = evaluation.rows[OTHER_SEED], evaluation.pictures[OTHER_SEED]
        return cls(rows, pictures, {**first.settings, "pipelines": pipelines})

    def to_markdown(self) -> str:
        """The table, one row per pipeline."""
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        headings = ["", *(_cell(HEADINGS.get(column, column)) for column in columns)]
        lines = [headings, ["---", *("---:" for _ in columns)]]
        for name, row in self.rows.items():
            lines.append([_cell(name), *(as_text(row[column]) if column in row else "–" for column in columns)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def save(self, directory: str | Path) -> Path:
        """Write `evaluation.json`, `evaluation.md` and `grid.png`, over those of the same evaluation.

        In the JSON, numbers that are not finite are the strings `"inf"`, `"-inf"` and `"nan"`.

        Raises:
            ValueError: The directory holds another evaluation, or is a file.

        Returns:
            The directory.
        """
        directory = Path(directory)
        check_directory(directory, self.settings)
        grid = make_grid({name: pictures.stills for name, pictures in self.pictures.items()}, self.labels)
        rows = {name: {key: _json(value) for key, value in row.items()} for name, row in self.rows.items()}
        table = self.to_markdown() + "\n"
        write_atomically(directory / GRID_NAME, lambda path: grid.save(path, format="PNG"))
        write_atomically(directory / TABLE_NAME, lambda path: path.write_text(table, encoding="utf-8"))
        write_json(directory / RESULT_NAME, {**self.settings, "rows": rows})
        return directory

    @property
    def labels(self) -> list[str]:
        """The prompts, as the grid shows them."""
        return [str(prompt) for prompt in self.reference.request.prompts]


def make_grid(rows: Mapping[str, torch.Tensor], labels: Sequence[str], columns: int = COLUMNS) -> Any:
    """A row of pictures for each name, the same seeds below each other, with the prompts above.

    Args:
        rows: (pictures, 3, height, width) uint8 by name.
        labels: For each column.
        columns: Pictures shown of each row, at most.

    Returns:
        A PIL picture.

    Example:
        >>> make_grid({"teacher": torch.zeros(2, 3, 8, 16, dtype=torch.uint8)}, ["a cat", "a dog"]).mode
        'RGB'
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = next(iter(rows.values())).shape[-2:]
    scale = min(1.0, CELL / max(height, width))
    # Pictures smaller than their label are wide apart rather than unreadable.
    cell_width, cell_height = max(round(width * scale), 64), max(round(height * scale), 16)
    gap, font = 6, ImageFont.load_default(size=12)
    left = gap + max(round(font.getlength(_printable(name))) for name in rows) + gap
    wrapped = ["\n".join(textwrap.wrap(_printable(label), cell_width // 7)[:3]) for label in labels[:columns]]
    top = gap + 15 * max(text.count("\n") + 1 for text in wrapped) + gap
    size = (left + len(wrapped) * (cell_width + gap), top + len(rows) * (cell_height + gap))
    sheet = Image.new("RGB", size, "#d8d8d8")  # so that white pictures have an edge
    pen = ImageDraw.Draw(sheet)
    for column, text in enumerate(wrapped):
        pen.multiline_text((left + column * (cell_width + gap), gap), text, fill="black", font=font)
    for row, (name, images) in enumerate(rows.items()):
        y = top + row * (cell_height + gap)
        pen.text((gap, y + cell_height // 2 - 7), _printable(name), fill="black", font=font)
        for column, image in enumerate(images[: len(wrapped)]):
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            if scale < 1:
                picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + column * (cell_width + gap), y))
    return sheet


def check_directory(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raise if files cannot be written into a directory of this name, or would replace those of something else."""
    existing = nearest_existing(directory)
    if not existing.is_dir():
        raise ValueError(f"output_dir {directory}: {existing} is a file, expected a directory.")
    if (directory / RESULT_NAME).exists():
        known = read_json(directory / RESULT_NAME)
        wanted = as_read_back({name: settings[name] for name in IDENTITY}, "the settings of an evaluation")
        if others := [name.replace("_", " ") for name in IDENTITY if known.get(name) != wanted[name]]:
            named = " and ".join(others)
            raise ValueError(
                f"output_dir {directory} holds an evaluation with other {named}: give another output_dir."
            )
        return
    for name in (TABLE_NAME, GRID_NAME):
        if (directory / name).exists():
            raise ValueError(f"output_dir {directory} holds a {name} of something else: give another output_dir.")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _same(one: Pictures, other: Pictures) -> bool:
    if one is other:
        return True
    alike = one.request.prompts == other.request.prompts and one.request.seeds == other.request.seeds
    return alike and torch.equal(one.images, other.images)
