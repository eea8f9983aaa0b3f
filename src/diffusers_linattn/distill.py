"""Fine-tune converted attention layers against the original model, which is the same module switched back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from torch import nn

from diffusers_linattn.files import as_read_back, nearest_existing, read_json, write_json
from diffusers_linattn.generation import check_pipeline
from diffusers_linattn.linearize import Layer, layers_of, single_transformer_of
from diffusers_linattn.samples import ONE_TRANSFORMER, Samples
from diffusers_linattn.training.checkpoints import checkpoint_to_resume, find_checkpoints, remove_checkpoints
from diffusers_linattn.training.config import DistillConfig
from diffusers_linattn.training.environment import (
    LOCK_NAME,
    accelerator_for,
    check_trackers,
    model_options,
    sole_trainer,
    trackers,
)
from diffusers_linattn.training.loop import Loop, Row, check_batch, prompt_dropout_of
from diffusers_linattn.training.objective import objective_of
from diffusers_linattn.training.optimizers import check_optimizer, check_parameters
from diffusers_linattn.training.phases import STAGES, end_to_end_phases, last_layer_losses, transfer_phases
from diffusers_linattn.training.teacher_student import TERMS
from diffusers_linattn.training.trainable import (
    check_can_be_saved,
    check_trainable,
    in_training,
    trained_parameters,
)
from diffusers_linattn.training.validation import Validation
from diffusers_linattn.weights import CONFIG_NAME, save_linear_attention


RUN_NAME = "run.json"
Curves = dict[str, list[Row]]


def distill(
    pipe: Any,
    samples: Samples | str | Path,
    output_dir: str | Path,
    config: DistillConfig | None = None,
    **options: Any,
) -> Curves:
    """Train the converted attention layers of a pipeline to do what its original attention does.

    First each layer by itself learns to give the teacher's attention output from the teacher's input, which needs no
    backward pass through the network; then all of them are trained end to end with the loss of CLEAR (arXiv
    2412.16112), with LiT's term (arXiv 2501.12976) where the model predicts a variance. Trained weights are in fp32,
    under autocast when the model is in bf16 or fp16. The teacher is the same module with its original processors and
    weights switched in: one more copy of the trained weights, not of the model.

    Stopped by SIGINT or SIGTERM, or in any other way, and called again with the same arguments, it goes on from its
    latest checkpoint in `output_dir`. The result is saved there, to be loaded with [`load_linear_attention`]; the
    pipeline holds it too, and [`restore`] gives the original back. A call that fails or is stopped leaves the
    pipeline's weights as they were. Under `accelerate launch` every process calls it, on its own device.

    Args:
        pipe: A pipeline whose attention is converted, wholly or in part.
        samples: What [`make_samples`] made, or its directory.
        output_dir: Where checkpoints, `metrics.jsonl`, validation pictures and the result go.
        config: All settings; `None` is the defaults of [`DistillConfig`].
        options: Settings by name, over those of `config`, such as `steps=2_000` or `trainable="lora"`.

    Returns:
        `{"transfer": [...], "end_to_end": [...]}`, for each step its losses by name.

    Raises:
        ValueError: Nothing to train, samples of another model or too few for a batch, a setting that does not exist
            or does not fit, an output directory that holds something else or that another run trains into, too little
            disk space; or ([`DivergedError`]) a loss that is not finite.

    Example:
        >>> linearize(pipe, ClearProcessor(window=16))  # doctest: +SKIP
        >>> distill(pipe, "samples/", "student/", batch_size=1, gradient_accumulation_steps=8)  # doctest: +SKIP
    """
    check_pipeline(pipe)
    config = DistillConfig.of(config, options)
    model = single_transformer_of(pipe, ONE_TRANSFORMER)
    layers = [layer for layer in layers_of(model) if layer.processor is not None]
    check_trainable(model, layers, config)
    check_can_be_saved(model, layers, config)
    check_optimizer(config)
    check_trackers(config)
    objective = objective_of(pipe)
    samples = samples if isinstance(samples, Samples) else Samples(samples)
    samples.check_fits(pipe)
    config = replace(config, prompt_dropout=prompt_dropout_of(model, samples, config))
    output_dir = Path(output_dir)
    validate = Validation.of(pipe, samples, config, output_dir)
    with accelerator_for(model, config, output_dir) as accelerator, model_options(model, config):
        check_batch(samples, config, accelerator)
        settings = _settings(config, layers, samples, accelerator)
        _check_directory(output_dir, settings)
        checkpoint = checkpoint_to_resume(output_dir, config.resume_from_checkpoint)
        with trained_parameters(model, layers, config) as parameters, ExitStack() as alone:
            check_parameters(config, parameters.values())
            _check_disk(output_dir, parameters, config)
            accelerator.wait_for_everyone()  # all have looked at the directory
            if accelerator.is_main_process:
                alone.enter_context(sole_trainer(output_dir))
                write_json(output_dir / RUN_NAME, settings)
            loop = Loop(accelerator, config, samples, objective, model, parameters, output_dir, validate)
            phases = transfer_phases(model, layers, samples.call, parameters, config)
            phases += end_to_end_phases(model, layers, samples.call, parameters, config)
            with trackers(accelerator, config), in_training(model, parameters):
                rows = loop.run(phases, checkpoint)
            curves: Curves = {name: [row for row in rows if row["stage"] == name] for name in STAGES}
            if accelerator.is_main_process:
                recipe = {"function": "diffusers_linattn.distill", "num_samples": len(samples), **settings["recipe"]}
                save_linear_attention(pipe, output_dir, recipe=recipe, metrics=_last_losses(curves))
                remove_checkpoints(output_dir)
            accelerator.wait_for_everyone()
    return curves


def _settings(
    config: DistillConfig, layers: Sequence[Layer], samples: Samples, accelerator: Accelerator
) -> dict[str, Any]:
    """What a run must have in common with the one that it goes on with."""
    recipe = config.recipe()
    # However it is split over processes and batches, the result is the same.
    recipe["batch_size"] *= accelerator.num_processes * recipe.pop("gradient_accumulation_steps")
    settings = {
        "recipe": recipe,
        "layers": {layer.name: [type(layer.processor).__name__, layer.processor.to_config()] for layer in layers},  # type: ignore[union-attr]
        "samples": hashlib.sha256(json.dumps(samples.manifest, sort_keys=True).encode()).hexdigest(),
    }
    read: dict[str, Any] = as_read_back(settings, "optimizer_arguments must be JSON-able")
    return read


def _check_directory(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raise if the directory holds anything but an unfinished run with these settings."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"output_dir {directory} is a file: give a directory that is empty or new.")
    if not (directory / RUN_NAME).exists():
        if any(path.name != LOCK_NAME for path in directory.iterdir()):
            raise ValueError(f"output_dir {directory} holds other files: give a directory that is empty or new.")
        return
    known = read_json(directory / RUN_NAME)
    if known != settings:
        parts = [name for name in settings if known.get(name) != settings[name]]
        recipes = known.get("recipe", {}), settings["recipe"]
        changed = [name for name in recipes[1] if recipes[0].get(name) != recipes[1][name]]
        raise ValueError(
            f"output_dir {directory} holds a run with other {' and '.join(parts)}"
            f"{': ' + ', '.join(changed) if changed else ''}. Give the same to go on with it, or another output_dir."
        )
    if (directory / CONFIG_NAME).exists():
        raise ValueError(
            f"output_dir {directory} holds the finished result of this very run: load it with load_linear_attention, "
            f"publish it with `diffusers-linattn push {directory} REPO`, or give another output_dir."
        )


def _check_disk(directory: Path, parameters: Mapping[str, nn.Parameter], config: DistillConfig) -> None:
    """Raise if the checkpoints do not fit: weights in fp32, two moments of each, perhaps their average."""
    count = sum(parameter.numel() for parameter in parameters.values())
    size = 4 * count * (3 + (config.ema_decay is not None))
    # The next one is written before the oldest goes; without a limit all stay, and at least two are counted.
    kept = (config.checkpoints_total_limit or 1) + 1
    needed = size * max(1, kept - len(find_checkpoints(directory)))
    free = shutil.disk_usage(nearest_existing(directory)).free
    if needed > free:
        raise ValueError(
            f"output_dir {directory} has {free / 1e9:.1f} GB free, its checkpoints need {needed / 1e9:.1f} GB more: "
            "lower checkpoints_total_limit, or give another output_dir."
        )


def _last_losses(curves: Curves, steps: int = 100) -> dict[str, float]:
    """The losses by name, averaged over the last steps of each stage; of the transfer the mean over all layers."""
    means: dict[str, float] = {}
    if curves["transfer"]:
        means["transfer loss"] = fmean(last_layer_losses(curves["transfer"], steps).values())
    rows = curves["end_to_end"][-steps:]
    for name in [name for name in ("loss", *TERMS) if rows and name in rows[0]]:
        means["end_to_end loss" if name == "loss" else f"end_to_end {name} loss"] = fmean(row[name] for row in rows)
    return {label: mean for label, mean in means.items() if math.isfinite(mean)}
