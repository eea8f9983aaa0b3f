"""`diffusers-linattn samples`: the samples that a pipeline is distilled on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers_linattn.cli.arguments import (
    Run,
    add_call,
    add_model,
    call_of_options,
    check_takes_classes,
    class_labels,
    flag_of,
    is_main_process,
    load_pipeline,
    resolution,
)
from diffusers_linattn.cli.config_file import add_config_file
from diffusers_linattn.samples import encode_images, make_samples


def add_samples(parser: argparse.ArgumentParser) -> Run:
    """Let a pipeline make the samples that its attention is distilled on, or encode pictures of your own."""
    add_config_file(parser)
    add_model(parser)
    source = parser.add_argument_group("what the samples are of", "One of these.")
    kinds = source.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one prompt per line")
    kinds.add_argument("--classes", type=class_labels, metavar="0-999", help="class labels")
    kinds.add_argument("--dataset", metavar="NAME", help="a data set of the Hub, or a folder, for datasets")
    kinds.add_argument(
        "--images", metavar="DIR_OR_NAME", help="captioned pictures to encode instead: a folder, or a data set"
    )
    source.add_argument("--dataset-split", metavar="NAME", help="split of the data set (default: train)")
    source.add_argument("--caption-column", metavar="NAME", help="column with the prompts (default: text)")
    output = parser.add_argument_group("samples")
    output.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where they go")
    output.add_argument(
        "--num-samples", type=int, metavar="N", help="how many; prompts are taken in turn (default: 10000)"
    )
    output.add_argument("--batch-size", type=int, default=4, metavar="N", help="samples at a time (default: 4)")
    output.add_argument("--seed", type=int, default=0, metavar="N", help="seeds everything (default: 0)")
    group = add_call(parser)
    group.add_argument(
        "--resolution",
        dest="resolutions",
        type=resolution,
        action="append",
        metavar="HEIGHTxWIDTH",
        help="in pixels; repeatable: each sample draws one. Without it the pipeline's own",
    )

    parser.usage = "%(prog)s --model ID_OR_PATH (--prompts FILE | --classes 0-999 | …) --output-dir DIR [flags]"

    def run(options: argparse.Namespace) -> None:
        _check_unused(options)
        common = {
            "batch_size": options.batch_size,
            "resolutions": options.resolutions,
            "seed": options.seed,
            "call_arguments": call_of_options(options),
        }
        if options.images:
            images = options.images if Path(options.images).is_dir() else _load(options.images, options.dataset_split)
            pipe = load_pipeline(options)
            samples = encode_images(pipe, images, options.output_dir, captions=options.caption_column, **common)
        else:
            prompts = options.prompts or options.classes or _column(options)
            pipe = load_pipeline(options)
            check_takes_classes(pipe, options)
            samples = make_samples(
                pipe,
                prompts,
                options.output_dir,
                num_samples=10_000 if options.num_samples is None else options.num_samples,
                guidance_scale=options.guidance_scale,
                num_inference_steps=options.num_inference_steps,
                **common,
            )
        if is_main_process():
            print(f"{len(samples)} samples in {options.output_dir}")

    return run


def _check_unused(options: argparse.Namespace) -> None:
    """Raise if there is a flag that means nothing for what the samples are of."""
    source = next(name for name in ("prompts", "classes", "dataset", "images") if getattr(options, name) is not None)
    unused = {
        "prompts": ("dataset_split", "caption_column"),
        "classes": ("dataset_split", "caption_column"),
        "dataset": (),
        "images": ("guidance_scale", "num_inference_steps", "num_samples"),
    }[source]
    for name in unused:
        if getattr(options, name) is not None:
            why = ", which are encoded, not drawn" if source == "images" else ""
            raise ValueError(f"{flag_of(name)} has no meaning with --{source}{why}.")


def _column(options: argparse.Namespace) -> Any:
    dataset = _load(options.dataset, options.dataset_split)
    column = options.caption_column or "text"
    if column not in dataset.column_names:
        names = ", ".join(dataset.column_names)
        raise ValueError(f"{options.dataset} has no column {column!r}, it has {names}: give --caption-column.")
    return dataset[column]


def _load(name: str, split: str | None) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("Data sets need the package datasets: pip install datasets.") from error
    return load_dataset(name, split=split or "train")
