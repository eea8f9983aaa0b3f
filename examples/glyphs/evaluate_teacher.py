"""Measure a glyph pipeline and draw a contact sheet.

    python examples/glyphs/evaluate_teacher.py                     # writes quality.json and teacher.png
    python examples/glyphs/evaluate_teacher.py --teacher pixart    # writes pixart_quality.json and pixart_teacher.png

The same judge reads the boards of the pipeline, as many real boards (what a perfect model would reach), real boards
through the autoencoder (what the transformer can reach at best), and shuffled boards (right letters, typefaces that do
not agree).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from boards import LETTERS, prompt, real_boards, shuffled_boards
from diffusers import AutoencoderKL
from judge import Judge
from PIL import Image
from teachers import TEACHERS


HERE = Path(__file__).parent
REAL_SEED = 11
SHEET_LETTERS = "AGKMQRSX"


def generate(pipeline: Any, call: dict[str, Any], letters: list[int], seed: int, batch: int = 26) -> torch.Tensor:
    """Boards (N, 3, 128, 128) in [0, 1]; the noise of a board depends only on the seed and its place."""
    parts = []
    for start in range(0, len(letters), batch):
        chosen = letters[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + place) for place in range(len(chosen))]
        prompts = [prompt(letter) for letter in chosen]
        parts.append(pipeline(prompts, generator=generators, output_type="pt", **call).images.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    parts = []
    for part in images.split(26):
        latents = vae.encode(part.to(vae.device, vae.dtype) * 2 - 1).latent_dist.mode()
        parts.append((vae.decode(latents).sample.float().cpu() / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def contact_sheet(images: torch.Tensor, columns: int = 4, gap: int = 8) -> Image.Image:
    """Boards side by side on gray."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 160, np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        pixels = image.permute(1, 2, 0).mul(255).round().byte().numpy()
        sheet[top : top + height, left : left + width] = pixels
    return Image.fromarray(sheet)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", choices=TEACHERS, default="flux")
    parser.add_argument("--pipeline", type=Path, help="its pipeline; the one beside this script if left out")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the two files")
    parser.add_argument("--per-letter", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    teacher = TEACHERS[arguments.teacher]
    pipeline = replace(teacher, folder=arguments.pipeline or teacher.folder).load().to(arguments.device)
    call = teacher.call(arguments.steps)
    judge = Judge.load()
    letters = list(range(len(LETTERS))) * arguments.per_letter
    real = real_boards(letters, REAL_SEED)
    started = time.perf_counter()
    images = generate(pipeline, call, letters, arguments.seed)
    seconds = time.perf_counter() - started
    scores = {
        "teacher": judge.score(images, letters),
        "real": judge.score(real, letters),
        "reconstructed": judge.score(reconstruct(pipeline.vae, real), letters),
        "shuffled": judge.score(shuffled_boards(letters, REAL_SEED), letters),
    }
    report = {
        "scores": {name: {key: round(value, 4) for key, value in score.items()} for name, score in scores.items()},
        "settings": {
            "boards": len(letters),
            "cells": 16 * len(letters),
            "steps": arguments.steps,
            "guidance_scale": 1.0,
            "seed": arguments.seed,
            "seconds_per_board": round(seconds / len(letters), 3),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    prefix = "" if arguments.teacher == "flux" else f"{arguments.teacher}_"
    (arguments.output / f"{prefix}quality.json").write_text(json.dumps(report, indent=2) + "\n")
    sheet = [LETTERS.index(letter) for letter in SHEET_LETTERS]
    pictures = contact_sheet(generate(pipeline, call, sheet, arguments.seed + 1000))
    pictures.save(arguments.output / f"{prefix}teacher.png", optimize=True)
    print(json.dumps(report["scores"], indent=2))


if __name__ == "__main__":
    main()
