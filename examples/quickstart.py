"""Swap, distil, save and load, on a pipeline small enough to live in this repository.

    python examples/quickstart.py

Takes the FLUX-architecture pipeline in examples/glyphs, makes its attention linear, distils the attention layers on
samples that the pipeline makes itself, saves the result, loads it into a fresh pipeline, and compares: original,
swapped but untrained, distilled. Leaves evaluation.json, evaluation.md and grid.png in the output folder. Stopped and
started again with the same arguments, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
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


def check_output(output: Path, settings: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Ends the program, before any work, if the output folder holds anything but a run with these settings."""
    settings_file = output / "settings.json"
    if settings_file.exists():
        held = json.loads(settings_file.read_text())
        others = [f"{name}={held.get(name)}" for name in settings if held.get(name) != settings[name]]
        if others:
            parser.error(f"{output} holds a run with {', '.join(others)}: give another folder with --output")
    elif output.exists() and not (output.is_dir() and not any(output.iterdir())):
        parser.error(f"{output} holds something else: give another folder with --output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for samples, weights, picture (quickstart-PROCESSOR)")
    parser.add_argument("--processor", choices=PROCESSORS, default="linear")
    parser.add_argument("--window", type=int, default=4, help="radius in tokens; a board has 16x16 tokens")
    parser.add_argument("--down-factor", type=int, default=1, help="above 1, pooled keys see the whole board")
    parser.add_argument("--samples", type=int, default=208, help="samples that the pipeline makes to learn from")
    parser.add_argument("--transfer-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=52, help="pictures to compare on")
    arguments = parser.parse_args()
    output = arguments.output or Path(f"quickstart-{arguments.processor}")
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    check_output(output, settings, parser)

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

    output.mkdir(parents=True, exist_ok=True)
    (output / "settings.json").write_text(json.dumps(settings))
    samples = make_samples(
        pipe,
        prompts,
        output / "samples",
        num_samples=arguments.samples,
        batch_size=26,
        resolutions=[(CALL["height"], CALL["width"])],
        num_inference_steps=CALL["num_inference_steps"],
        call_arguments={"max_sequence_length": CALL["max_sequence_length"]},
    )
    if not (output / "student" / "linear_attention_config.json").exists():  # else trained by an earlier run
        distill(
            pipe,
            samples,
            output / "student",
            transfer_steps=arguments.transfer_steps,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            transfer_learning_rate=1e-3,
            learning_rate=6e-4,
            prompt_dropout=0.0,  # this teacher has never been without a prompt
        )

    student = load_linear_attention(load_pipeline(), output / "student")
    distilled = evaluate(student, reference=swapped.reference, batch_size=8, metrics=[judged])

    table = Evaluation.join({"swapped": swapped, "distilled": distilled})
    table.save(output)
    print("\n" + table.to_markdown())
    print(f"\nPictures: {output / 'grid.png'}   Weights: {output / 'student'}")


if __name__ == "__main__":
    main()
