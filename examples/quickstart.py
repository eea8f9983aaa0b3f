"""Swap, distil, save and load, on a pipeline small enough to live in this repository.

    python examples/quickstart.py

Takes the FLUX-architecture pipeline in examples/glyphs, makes its attention linear, distils the attention layers on
samples that the pipeline makes itself, saves the result, loads it into a fresh pipeline, and compares: original,
swapped but untrained, distilled. Leaves evaluation.json, evaluation.md and grid.png in the output folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from diffusers import FluxPipeline


GLYPHS = Path(__file__).resolve().parent / "glyphs"
sys.path.insert(0, str(GLYPHS))

from boards import LETTERS  # noqa: E402
from judge import Judge  # noqa: E402

from diffusers_linattn import (  # noqa: E402
    ClearProcessor,
    GLAProcessor,
    HybridProcessor,
    LinearProcessor,
    distill,
    evaluate,
    linearize,
    load_linear_attention,
    make_samples,
    status,
)
from diffusers_linattn.evaluate import Evaluation  # noqa: E402


CALL = {"height": 128, "width": 128, "max_sequence_length": 8, "num_inference_steps": 20}
PROCESSORS = {
    "clear": lambda arguments: ClearProcessor(window=arguments.window, down_factor=arguments.down_factor),
    "linear": lambda arguments: LinearProcessor(),
    "gla": lambda arguments: GLAProcessor(),
    "hybrid": lambda arguments: HybridProcessor(window=arguments.window),
}


def load_pipeline() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(GLYPHS / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for samples, weights, picture")
    parser.add_argument("--processor", choices=PROCESSORS, default="linear")
    parser.add_argument("--window", type=int, default=4, help="radius in tokens; a board has 16x16 tokens")
    parser.add_argument("--down-factor", type=int, default=1, help="above 1, pooled keys see the whole board")
    parser.add_argument("--samples", type=int, default=208, help="samples that the pipeline makes to learn from")
    parser.add_argument("--transfer-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=52, help="pictures to compare on")
    arguments = parser.parse_args()

    prompts = [f"the letter {letter}" for letter in LETTERS]
    judge = Judge.load()

    def judged(images: Any, asked: list[str]) -> dict[str, float]:
        return judge.score(images, [prompt[-1] for prompt in asked])

    pipe = load_pipeline()
    linearize(pipe, PROCESSORS[arguments.processor](arguments))
    swapped = evaluate(
        pipe, prompts, num_images=arguments.pictures, batch_size=8, call_arguments=CALL, metrics=[judged]
    )
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
        prompt_dropout=0.0,  # this teacher has never been without a prompt
    )

    student = load_linear_attention(load_pipeline(), arguments.output / "student")
    distilled = evaluate(student, reference=swapped.reference, batch_size=8, metrics=[judged])

    table = Evaluation.join({"swapped": swapped, "distilled": distilled})
    table.save(arguments.output)
    print("\n" + table.to_markdown())
    print(f"\nPictures: {arguments.output / 'grid.png'}   Weights: {arguments.output / 'student'}")


if __name__ == "__main__":
    main()
