"""How a distillation is run: every setting, with its default and what it means."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers_linattn.ops.checks import check_choice, check_positive_int


TRAINABLE = ("attention", "processors", "lora")
TIMESTEP_SAMPLING = ("uniform", "logit_normal")
MIXED_PRECISION = (None, "no", "bf16", "fp16")


def _setting(default: Any, help: str, *, changes_result: bool = True) -> Any:
    return field(default=default, metadata={"help": help, "changes_result": changes_result})


def _factory(make: Any, help: str, *, changes_result: bool = True) -> Any:
    return field(default_factory=make, metadata={"help": help, "changes_result": changes_result})


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The settings of [`distill`]. Each field has a `help` text in its metadata, which the command line shows.

    Loss weights, learning rate and 10,000 steps in all are those of CLEAR (arXiv 2412.16112), which trains end to end
    from the start, with batches of 32 samples. LiT (arXiv 2501.12976) weighs `prediction` 0.5 at 256 px and 1.0 above,
    `variance` 0.05.

    Raises:
        ValueError: A value out of its range.

    Example:
        >>> DistillConfig(transfer_steps=200, learning_rate=3e-4).trainable
        'attention'
    """

    transfer_steps: int = _setting(1_000, "steps of attention transfer: each layer by itself, on the teacher's inputs")
    steps: int = _setting(9_000, "steps end to end, after the transfer")
    batch_size: int = _setting(4, "samples per step and process")
    gradient_accumulation_steps: int = _setting(1, "batches whose gradients are averaged before each step")

    trainable: str = _setting(
        "attention", "attention: projections and processors; processors: their own weights alone; lora: low rank"
    )
    rank: int = _setting(64, "rank of the LoRA, with trainable lora")
    layers_per_group: int | None = _setting(
        None, "transfer so many layers at a time, one group after another; none: all at once"
    )

    transfer_learning_rate: float = _setting(3e-4, "learning rate of the transfer")
    learning_rate: float = _setting(1e-4, "learning rate end to end")
    optimizer: str = _setting("AdamW", "a class of torch.optim, or adamw8bit (bitsandbytes), or prodigy (prodigyopt)")
    optimizer_arguments: Mapping[str, Any] = _factory(dict, "further arguments of the optimizer, JSON")
    lr_scheduler: str = _setting("cosine", "a learning-rate schedule of diffusers, for each stage by itself")
    lr_scheduler_arguments: Mapping[str, Any] = _factory(
        dict, "what some schedules take, JSON: step_rules of piecewise_constant, num_cycles, power"
    )
    lr_warmup_steps: int = _setting(0, "steps over which the learning rate rises, in each stage")
    max_grad_norm: float | None = _setting(1.0, "gradients are clipped to this norm, end to end")
    ema_decay: float | None = _setting(None, "keep a moving average of the trained weights, and save that")

    diffusion_weight: float = _setting(1.0, "weight of the model's own diffusion loss")
    prediction_weight: float = _setting(0.5, "weight of the distance to the teacher's prediction")
    attention_weight: float = _setting(
        0.5, "weight of the distance to the teacher's attention outputs, mean of layers"
    )
    variance_weight: float = _setting(
        0.05, "weight of the distance to the teacher's variance, for models that predict it"
    )
    timestep_sampling: str = _setting("uniform", "how training timesteps are drawn: uniform or logit_normal")
    prompt_dropout: float = _setting(
        0.1, "share of the samples trained without their prompt; none if samples were made without guidance"
    )

    mixed_precision: str | None = _setting(
        None, "autocast in bf16 or fp16, or no for no autocast (default: as the model's own precision asks)"
    )
    gradient_checkpointing: bool = _setting(
        False, "recompute activations in the backward pass, which saves memory", changes_result=False
    )
    shard_optimizer: bool = _setting(
        False, "divide the optimizer's state among the processes (ZeRO), which saves memory", changes_result=False
    )
    compile: bool = _setting(False, "torch.compile the repeated blocks of the model", changes_result=False)
    seed: int = _setting(0, "seeds what is drawn: samples, noise, timesteps")

    checkpointing_steps: int = _setting(500, "write a checkpoint every so many steps", changes_result=False)
    checkpoints_total_limit: int | None = _setting(
        2, "keep only the latest so many checkpoints; none: all", changes_result=False
    )
    resume_from_checkpoint: str | None = _setting(
        "latest", "latest, or the name of a checkpoint in the output folder; none: start afresh", changes_result=False
    )
    validation_steps: int | None = _setting(
        None, "draw validation pictures every so many steps; none: never", changes_result=False
    )
    validation_prompts: tuple[str | int, ...] = _factory(
        tuple, "prompts of the validation pictures; none: the first four of the samples", changes_result=False
    )
    validation_metrics: tuple[str | Callable[..., Any], ...] = _factory(
        tuple, "what to measure of them besides the distances: lpips, clip, fid", changes_result=False
    )
    report_to: tuple[str, ...] = _factory(
        tuple, "trackers of accelerate, such as tensorboard, wandb, trackio", changes_result=False
    )

    def __post_init__(self) -> None:
        for name in ("transfer_steps", "steps", "lr_warmup_steps"):
            check_positive_int(name, getattr(self, name), minimum=0)
        if self.transfer_steps + self.steps == 0:
            raise ValueError("transfer_steps and steps are both 0: there is nothing to do.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed must be an integer, got {self.seed!r}.")
        for name in ("batch_size", "gradient_accumulation_steps", "rank", "checkpointing_steps"):
            check_positive_int(name, getattr(self, name))
        for name in ("layers_per_group", "checkpoints_total_limit", "validation_steps"):
            if getattr(self, name) is not None:
                check_positive_int(name, getattr(self, name))
        check_choice("trainable", self.trainable, TRAINABLE)
        check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLING)
        check_choice("mixed_precision", self.mixed_precision, MIXED_PRECISION)
        for name in ("transfer_learning_rate", "learning_rate"):
            _check_number(name, getattr(self, name), above=0)
        for name in ("diffusion_weight", "prediction_weight", "attention_weight", "variance_weight"):
            _check_number(name, getattr(self, name))
        _check_number("prompt_dropout", self.prompt_dropout, most=1)
        if self.max_grad_norm is not None:
            _check_number("max_grad_norm", self.max_grad_norm, above=0)
        if self.ema_decay is not None:
            _check_number("ema_decay", self.ema_decay, most=1)
        for name in ("validation_prompts", "validation_metrics", "report_to"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} takes a list, got the string {getattr(self, name)!r}.")
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list is as good
        for name in ("validation_prompts", "validation_metrics"):
            if getattr(self, name) and self.validation_steps is None:
                raise ValueError(f"{name} are not used without validation_steps: say after how many steps.")

    @classmethod
    def of(cls, config: DistillConfig | None, options: Mapping[str, Any]) -> DistillConfig:
        """`config`, or the defaults, with some settings replaced.

        Raises:
            ValueError: A setting that does not exist.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ValueError(f"distill has no setting {name!r}.{hint} There are: {', '.join(names)}.")
        return dataclasses.replace(config or cls(), **options)

    def recipe(self) -> dict[str, Any]:
        """What decides the result, JSON-able: without where checkpoints lie and how progress is shown."""
        fields = [field for field in dataclasses.fields(self) if field.metadata["changes_result"]]
        return {field.name: getattr(self, field.name) for field in fields}


def _check_number(name: str, value: Any, *, above: float | None = None, most: float | None = None) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value < 0 or (above is not None and value <= above) or (most is not None and value > most):
        wanted = "a number above 0" if above is not None else "a number, at least 0"
        wanted += "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")
