"""Fine-tune converted attention layers against the original model, which is the same module switched back."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from torch import nn

from diffusers_linattn.files import read_json, write_json
from diffusers_linattn.linearize import Layer, layers_of, single_transformer_of
from diffusers_linattn.lora import lora_to_save
from diffusers_linattn.samples import ONE_TRANSFORMER, Samples
from diffusers_linattn.training.checkpoints import checkpoint_to_resume, remove_checkpoints
from diffusers_linattn.training.config import DistillConfig
from diffusers_linattn.training.environment import accelerator_for, model_options, start_trackers
from diffusers_linattn.training.loop import Loop, Phase, Row
from diffusers_linattn.training.objective import objective_of
from diffusers_linattn.training.optimizers import check_optimizer
from diffusers_linattn.training.teacher_student import TERMS, AttentionTransfer, EndToEnd
from diffusers_linattn.training.trainable import check_trainable, dtype_of, trained_parameters
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
            or does not fit, an output directory that holds something else, too little disk space; or
            ([`DivergedError`]) a loss that is not finite.

    Example:
        >>> linearize(pipe, ClearProcessor(window=16))  # doctest: +SKIP
        >>> distill(pipe, "samples/", "student/", batch_size=1, gradient_accumulation_steps=8)  # doctest: +SKIP
    """
    config = DistillConfig.of(config, options)
    model = single_transformer_of(pipe, ONE_TRANSFORMER)
    layers = [layer for layer in layers_of(model) if layer.processor is not None]
    check_trainable(model, layers, config)
    check_optimizer(config)
    lora_to_save(model, [layer.attn for layer in layers])  # whether the result can be saved
    objective = objective_of(pipe)
    samples = samples if isinstance(samples, Samples) else Samples(samples)
    samples.check_fits(pipe)
    output_dir = Path(output_dir)
    with accelerator_for(model, config, output_dir) as accelerator, model_options(model, config):
        settings = _settings(config, layers, samples, accelerator)
        _check_directory(output_dir, settings)
        checkpoint = checkpoint_to_resume(output_dir, config.resume_from_checkpoint)
        with trained_parameters(model, layers, config) as parameters:
            _check_disk(output_dir, parameters, config)
            accelerator.wait_for_everyone()  # all have looked at the directory
            if accelerator.is_main_process:
                write_json(output_dir / RUN_NAME, settings)
            start_trackers(accelerator, config)
            loop = Loop(
                accelerator,
                config,
                samples,
                objective,
                parameters,
                output_dir,
                dtype=dtype_of(model, parameters),
                device=accelerator.device if accelerator.num_processes > 1 else model.device,
                prompt_dropout=_prompt_dropout(model, samples, config),
                validate=Validation.of(pipe, samples, config, output_dir),
            )
            rows = loop.run(_phases(model, layers, samples, parameters, config), checkpoint)
        curves: Curves = {name: [row for row in rows if row["stage"] == name] for name in ("transfer", "end_to_end")}
        if accelerator.is_main_process:
            recipe = {"function": "diffusers_linattn.distill", "num_samples": len(samples), **settings["recipe"]}
            save_linear_attention(pipe, output_dir, recipe=recipe, metrics=_last_losses(curves))
            remove_checkpoints(output_dir)
        accelerator.end_training()
    return curves


def _phases(
    model: nn.Module,
    layers: Sequence[Layer],
    samples: Samples,
    parameters: Mapping[str, nn.Parameter],
    config: DistillConfig,
) -> list[Phase]:
    """The transfer, in groups of layers one after the other, and then all layers end to end."""
    size = config.layers_per_group or len(layers)
    phases: list[Phase] = []
    for first in range(0, len(layers), size):
        group = layers[first : first + size]
        prefixes = tuple(f"{layer.name}." for layer in group)
        trained = {name: parameter for name, parameter in parameters.items() if name.startswith(prefixes)}
        if trained:
            transfer = AttentionTransfer(model, group, samples.call, config)
            phases.append(Phase("transfer", transfer, trained, config.transfer_steps, config.transfer_learning_rate))
    end_to_end = EndToEnd(model, layers, samples.call, config)
    return [*phases, Phase("end_to_end", end_to_end, parameters, config.steps, config.learning_rate)]


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
    if len(samples) < recipe["batch_size"]:
        raise ValueError(
            f"{samples.directory} holds {len(samples)} samples, too few for batches of {recipe['batch_size']}: make "
            "more, or lower batch_size."
        )
    try:
        read: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))  # as it will be read back
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer_arguments must be JSON-able: {error}.") from error
    return read


def _check_directory(directory: Path, settings: Mapping[str, Any]) -> None:
    """Raise if the directory holds anything but an unfinished run with these settings."""
    if not directory.exists():
        return
    if not (directory / RUN_NAME).exists():
        if any(directory.iterdir()):
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
            "or give another output_dir."
        )


def _check_disk(directory: Path, parameters: Mapping[str, nn.Parameter], config: DistillConfig) -> None:
    """Raise if the checkpoints do not fit: weights in fp32, two moments of each, perhaps their average."""
    count = sum(parameter.numel() for parameter in parameters.values())
    kept = (config.checkpoints_total_limit or 1) + 1  # the next one is written before the oldest goes
    needed = 4 * count * (3 + (config.ema_decay is not None)) * kept
    existing = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ValueError(
            f"output_dir {directory} has {free / 1e9:.1f} GB free, {kept} checkpoints need {needed / 1e9:.1f} GB: "
            "lower checkpoints_total_limit, or give another output_dir."
        )


def _prompt_dropout(model: Any, samples: Samples, config: DistillConfig) -> float:
    """Only models that are guided by two predictions have to predict without a prompt."""
    given = samples.manifest["settings"]["call_arguments"]
    scale = given.get("guidance_scale")
    by_scale = not getattr(model.config, "guidance_embeds", False) and (scale is None or scale > 1)
    by_negative_prompt = given.get("true_cfg_scale", 1.0) > 1
    return config.prompt_dropout if samples.has_null and (by_scale or by_negative_prompt) else 0.0


def _last_losses(curves: Curves, steps: int = 100) -> dict[str, float]:
    """The losses by name, averaged over the last steps of each stage; those of single layers are left out."""
    means: dict[str, float] = {}
    for stage, names in (("transfer", ["loss"]), ("end_to_end", ["loss", *TERMS])):
        rows = curves[stage][-steps:]
        for name in [name for name in names if rows and name in rows[0]]:
            label = stage if name == "loss" else f"{stage} {name}"
            means[f"{label} loss"] = fmean(row[name] for row in rows)
    return {label: mean for label, mean in means.items() if math.isfinite(mean)}
