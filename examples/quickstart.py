"""Swap, distil, save and load, on a pipeline small enough to live in this repository.

    python examples/quickstart.py

Takes the FLUX-architecture pipeline in examples/glyphs, makes its attention linear, distils the attention layers on
samples that the pipeline makes itself, saves the result, loads it into a fresh pipeline, and compares: original,
swapped but untrained, distilled. Leaves quickstart.png and quickstart.json in the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw


GLYPHS = Path(__file__).resolve().parent / "glyphs"
sys.path.insert(0, str(GLYPHS))

from boards import LETTERS  # noqa: E402
from judge import Judge  # noqa: E402

from diffusers_linattn import (  # noqa: E402
    ClearProcessor,
    GLAProcessor,
    LinearProcessor,
    distill,
    linearize,
    load_linear_attention,
    make_samples,
    status,
)
from diffusers_linattn.evaluate import closeness, generate  # noqa: E402


CALL = {"height": 128, "width": 128, "max_sequence_length": 8, "num_inference_steps": 20}
PROCESSORS = {
    "clear": lambda arguments: ClearProcessor(window=arguments.window, down_factor=arguments.down_factor),
    "linear": lambda arguments: LinearProcessor(),
    "gla": lambda arguments: GLAProcessor(),
}


def load_pipeline() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(GLYPHS / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def contact_sheet(rows: dict[str, torch.Tensor], count: int) -> Image.Image:
    """One labelled row of pictures per pipeline, the same seeds below each other."""
    size, gap, margin = next(iter(rows.values())).shape[-1], 6, 78
    sheet = Image.new("RGB", (margin + count * (size + gap), len(rows) * (size + gap) + gap), "#909090")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(rows.items()):
        top = gap + row * (size + gap)
        draw.text((6, top + size // 2), name, fill="black")
        for column, image in enumerate(images[:count]):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (margin + column * (size + gap), top))
    return sheet


def print_table(table: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(table.values())))
    print("\n" + f"{'':<12}" + "".join(f"{column:>12}" for column in columns))
    for name, row in table.items():
        print(f"{name:<12}" + "".join(f"{row[column]:>12.3f}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for samples, weights, picture")
    parser.add_argument("--processor", choices=PROCESSORS, default="linear")
    parser.add_argument("--window", type=int, default=4, help="radius in tokens; a board has 16x16 tokens")
    parser.add_argument("--down-factor", type=int, default=1, help="above 1, pooled keys see the whole board")
    parser.add_argument("--samples", type=int, default=208, help="samples that the pipeline makes to learn from")
    parser.add_argument("--transfer-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=52, help="pictures to compare on")
    arguments = parser.parse_args()

    prompts = [f"the letter {letter}" for letter in LETTERS]
    asked = [LETTERS[i % len(LETTERS)] for i in range(arguments.pictures)]
    compared = [f"the letter {letter}" for letter in asked]
    pictures, table = {}, {}

    pipe = load_pipeline()
    original_latents, original_images = pictures["original"] = generate(pipe, compared, seed=0, **CALL)

    linearize(pipe, PROCESSORS[arguments.processor](arguments))
    pictures["swapped"] = generate(pipe, compared, seed=0, **CALL)
    print(status(pipe))

    samples = make_samples(
        pipe,
        prompts,
        arguments.output / "samples",
        num_samples=arguments.samples,
        batch_size=26,
        resolutions=[(CALL["height"], CALL["width"])],
        num_inference_steps=CALL["num_inference_steps"],
        call_arguments={"max_sequence_length": CALL["max_sequence_length"]},
    )
    distill(
        pipe,
        samples,
        arguments.output / "student",
        transfer_steps=arguments.transfer_steps,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        transfer_learning_rate=1e-3,
        learning_rate=6e-4,
    )

    student = load_linear_attention(load_pipeline(), arguments.output / "student")
    pictures["distilled"] = generate(student, compared, seed=0, **CALL)

    judge = Judge.load()
    for name, (latents, images) in pictures.items():
        table[name] = closeness(latents, images, original_latents, original_images) | judge.score(images, asked)
    print_table(table)
    contact_sheet({name: images for name, (_, images) in pictures.items()}, 8).save(
        arguments.output / "quickstart.png"
    )
    (arguments.output / "quickstart.json").write_text(json.dumps(table, indent=2) + "\n")
    print(f"\nPicture: {arguments.output / 'quickstart.png'}   Weights: {arguments.output / 'student'}")


if __name__ == "__main__":
    main()
