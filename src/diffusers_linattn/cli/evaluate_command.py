"""`diffusers-linattn evaluate`: how close linear attention comes to the original."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers_linattn.cli.arguments import (
    Run,
    add_attention,
    add_call,
    add_model,
    call_of_options,
    check_takes_classes,
    class_labels,
    convert,
    load_pipeline,
    processor_of,
    resolution,
    start_process,
)
from diffusers_linattn.cli.config_file import add_config_file
from diffusers_linattn.evaluate import evaluate
from diffusers_linattn.evaluation.metrics import NETWORKS
from diffusers_linattn.samples import Samples


def add_evaluate(parser: argparse.ArgumentParser) -> Run:
    """Draw the same pictures with linear and with original attention, and measure how far apart they are."""
    add_config_file(parser)
    add_model(parser)
    add_attention(parser, "--weights", "linear attention that was saved: a folder or a repository")
    asked = parser.add_argument_group("prompts", "One of these; prompts beside samples take only their settings.")
    kinds = asked.add_mutually_exclusive_group()
    kinds.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one prompt or class label per line")
    kinds.add_argument("--classes", type=class_labels, metavar="0-999", help="class labels")
    asked.add_argument(
        "--samples", type=Path, metavar="DIR", help="prompts, guidance, steps and size of these samples"
    )
    group = add_call(parser)
    group.add_argument("--resolution", type=resolution, metavar="HEIGHTxWIDTH", help="in pixels")
    group.add_argument(
        "--num-images", type=int, metavar="N", help="how many; without it one for each prompt, of samples at most 64"
    )
    group.add_argument("--batch-size", type=int, default=4, metavar="N", help="pictures at a time (default: 4)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first picture (default: 0)")
    table = parser.add_argument_group("table")
    table.add_argument(
        "--metrics",
        nargs="+",
        choices=sorted(NETWORKS),
        help="besides latent MSE, PSNR and SSIM; their weights have to be there",
    )
    table.add_argument("--other-seed", action="store_true", help="a row of the original attention with other seeds")
    table.add_argument("--output-dir", type=Path, metavar="DIR", help="write evaluation.json, evaluation.md, grid.png")

    parser.usage = "%(prog)s --model ID_OR_PATH (--weights REPO_OR_DIR | --processor NAME) [flags]"

    def run(options: argparse.Namespace) -> None:
        processor = processor_of(options)
        arguments = _call(options)
        samples = Samples(options.samples) if options.samples else None
        prompts = options.prompts or options.classes
        if prompts is None and samples is None:
            raise ValueError("No prompts: give --prompts FILE, --classes or --samples DIR.")
        if start_process(options).num_processes > 1:
            raise ValueError("evaluate runs in one process: start it without a launcher.")
        pipe = load_pipeline(options)
        check_takes_classes(pipe, options)
        convert(pipe, processor, options)
        result = evaluate(
            pipe,
            prompts,
            samples=samples,
            num_images=options.num_images,
            seed=options.seed,
            batch_size=options.batch_size,
            metrics=options.metrics,
            output_dir=options.output_dir,
            call_arguments=arguments,
            other_seed=options.other_seed,
        )
        print(result.to_markdown())

    return run


def _call(options: argparse.Namespace) -> dict[str, Any]:
    arguments = call_of_options(options)
    for name in ("guidance_scale", "num_inference_steps"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    if options.resolution:
        arguments["height"], arguments["width"] = options.resolution
    return arguments
