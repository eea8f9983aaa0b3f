"""`diffusers-linattn distill`: train the attention layers of a pipeline."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from pathlib import Path
from typing import Any

from diffusers_linattn.cli.arguments import (
    Run,
    add_attention,
    add_flag,
    add_model,
    convert,
    default_text,
    is_main_process,
    labels_if_classes,
    load_pipeline,
    processor_of,
    start_process,
)
from diffusers_linattn.cli.config_file import add_config_file
from diffusers_linattn.distill import distill
from diffusers_linattn.hub import check_can_push, push_folder
from diffusers_linattn.samples import Samples
from diffusers_linattn.training.config import DistillConfig


# How the settings are shown; what stands in none of these comes last.
GROUPS = {
    "length of the training": ("transfer_steps", "steps", "batch_size", "gradient_accumulation_steps"),
    "what is trained": ("trainable", "rank", "layers_per_group"),
    "optimizer": (
        "transfer_learning_rate",
        "learning_rate",
        "lr_scheduler",
        "lr_scheduler_arguments",
        "lr_warmup_steps",
        "optimizer",
        "optimizer_arguments",
        "max_grad_norm",
        "ema_decay",
    ),
    "loss": (
        "diffusion_weight",
        "prediction_weight",
        "attention_weight",
        "variance_weight",
        "timestep_sampling",
        "prompt_dropout",
    ),
    "memory and speed": ("mixed_precision", "gradient_checkpointing", "shard_optimizer", "compile"),
    "checkpoints": ("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    "validation and trackers": ("validation_steps", "validation_prompts", "validation_metrics", "report_to"),
}


def add_distill(parser: argparse.ArgumentParser) -> Run:
    """Train the converted attention layers of a pipeline towards its original attention. Stopped, it goes on."""
    add_config_file(parser)
    add_model(parser)
    add_attention(parser, "--init", "go on from linear attention that was saved, or trained by others")
    data = parser.add_argument_group("data")
    data.add_argument("--samples", type=Path, required=True, metavar="DIR", help="what `samples` made")
    data.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where checkpoints and result go")
    data.add_argument("--push-to-hub", metavar="REPO", help="publish the result there at the end")
    _add_settings(parser)
    parser.usage = (
        "%(prog)s --model ID_OR_PATH (--processor NAME | --init REPO_OR_DIR) --samples DIR --output-dir DIR [flags]"
    )

    def run(options: argparse.Namespace) -> None:
        # What can be wrong is found before the model is loaded.
        processor = processor_of(options)
        config = settings_of(options)
        samples = Samples(options.samples)
        if start_process(options).is_main_process and options.push_to_hub:
            check_can_push(options.push_to_hub)
        pipe = load_pipeline(options)
        convert(pipe, processor, options)
        prompts = labels_if_classes(pipe, config.validation_prompts)
        distill(pipe, samples, options.output_dir, dataclasses.replace(config, validation_prompts=prompts))
        if is_main_process():
            print(f"Saved to {options.output_dir}")
            if options.push_to_hub:
                commit = push_folder(options.output_dir, options.push_to_hub)
                print(commit.pr_url or commit.commit_url)

    return run


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of the settings."""
    hints = typing.get_type_hints(DistillConfig)
    fields = {field.name: field for field in dataclasses.fields(DistillConfig)}
    named = [name for names in GROUPS.values() for name in names]
    rest = {"further settings": tuple(name for name in fields if name not in named)}
    for title, names in {**GROUPS, **rest}.items():
        group = parser.add_argument_group(title)
        for name in names:
            add_flag(group, name, hints[name], _explained(fields[name]))


def settings_of(options: argparse.Namespace) -> DistillConfig:
    """The training settings among the options.

    Raises:
        ValueError: A value out of its range, or a rank without a LoRA.
    """
    names = [field.name for field in dataclasses.fields(DistillConfig)]
    config = DistillConfig(**{name: getattr(options, name) for name in names if hasattr(options, name)})
    if hasattr(options, "rank") and config.trainable != "lora":
        raise ValueError(f"--rank is that of a LoRA, and --trainable is {config.trainable}: give --trainable lora.")
    return config


def _explained(field: dataclasses.Field[Any]) -> str:
    help: str = field.metadata["help"]
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return help if "default:" in help else f"{help} ({default_text(default)})"
