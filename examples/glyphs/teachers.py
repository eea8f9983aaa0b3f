"""The glyph pipelines that lie beside this file, and how they are called."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from boards import LETTERS, prompt
from diffusers import DiffusionPipeline
from text import TOKENS


HERE = Path(__file__).resolve().parent
BOARD = 128  # pixels
# Of every letter one, so that any number of pictures has nearly as many of each.
PROMPTS = [prompt(letter) for letter in range(len(LETTERS))]


@dataclass(frozen=True)
class Teacher:
    """A pipeline, and the arguments of its call that make a board."""

    folder: Path
    arguments: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def call(self, steps: int) -> dict[str, Any]:
        """Arguments of the pipeline's call."""
        size = {"height": BOARD, "width": BOARD, "num_inference_steps": steps, "guidance_scale": 1.0}
        return {**size, "max_sequence_length": TOKENS, **self.arguments}


TEACHERS = {
    "flux": Teacher(HERE / "pipeline"),
    # Its buckets of resolutions begin at 256 pixels.
    "pixart": Teacher(HERE / "pixart_pipeline", {"use_resolution_binning": False, "clean_caption": False}),
}


def letter_of(asked: str) -> int:
    """The letter that a prompt asks for, as an index."""
    return PROMPTS.index(asked)
