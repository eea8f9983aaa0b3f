"""Fine-tune converted attention layers against the original model, which is the same module switched back."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from diffusers_linattn.files import write_atomically, write_json
from diffusers_linattn.linearize import Layer, layers_of, original_attention, single_transformer_of
from diffusers_linattn.lora import lora_to_save
from diffusers_linattn.models.projections import PROJECTIONS
from diffusers_linattn.samples import ONE_TRANSFORMER, Batch, Samples
from diffusers_linattn.weights import save_linear_attention


CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "training_log.json"


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three terms of CLEAR's loss (arXiv 2412.16112).

    Args:
        diffusion: MSE of the prediction to the flow target, noise - latents.
        prediction: MSE of the prediction to the teacher's.
        attention: MSE of the attention outputs to the teacher's, mean over layers.
    """

    diffusion: float = 1.0
    prediction: float = 0.5
    attention: float = 0.5


def distill(
    pipe: Any,
    samples: Samples | str | Path,
    output_dir: str | Path,
    *,
    transfer_steps: int = 1_000,
    steps: int = 9_000,
    batch_size: int = 4,
    transfer_learning_rate: float = 3e-4,
    learning_rate: float = 1e-4,
    loss_weights: LossWeights | None = None,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    checkpoint_every: int = 500,
) -> dict[str, list[dict[str, float]]]:
    """Train the converted attention layers of a pipeline to do what its original attention does.

    First each layer by itself learns to give the teacher's attention output from the teacher's input, which needs no
    backward pass through the network; then all of them are trained end to end with the loss of CLEAR (arXiv
    2412.16112). Trained are the processors' own weights and to_q, to_k, to_v and to_out of the converted layers, in
    fp32 under autocast when the model is in bf16 or fp16. The teacher is the same module with its original processors
    and weights switched in: one more copy of the trained weights, not of the model.

    Stopped and called again with the same arguments, it goes on from its latest checkpoint in `output_dir`. The
    result is saved there, to be loaded with [`load_linear_attention`]; the pipeline holds it too, and [`restore`]
    gives the original back.

    Args:
        pipe: A pipeline of a flow-matching model whose attention is converted.
        samples: What [`make_samples`] made, or its directory.
        output_dir: Where checkpoints and the result go.
        transfer_steps: Steps of the first stage.
        steps: Steps of the second stage.
        batch_size: Samples per step.
        transfer_learning_rate: Of AdamW in the first stage, decaying to 0 along a cosine.
        learning_rate: The same for the second stage.
        loss_weights: Weights of the three terms of the second stage; `None` is CLEAR's 1, 0.5 and 0.5.
        max_grad_norm: Gradients are clipped to this norm in the second stage.
        seed: Of the draws of samples, timesteps and noise.
        checkpoint_every: Steps between checkpoints.

    Returns:
        The loss curves: `{"transfer": [...], "end_to_end": [...]}`, one row of named numbers per step.

    Raises:
        ValueError: Several transformers, no converted layer, fused projections, samples of another model, a checkpoint
            of other settings.
    """
    samples = samples if isinstance(samples, Samples) else Samples(samples)
    output_dir = Path(output_dir)
    model = single_transformer_of(pipe, ONE_TRANSFORMER)
    layers = [layer for layer in layers_of(model) if layer.processor is not None]
    _check(layers, model)
    samples.check_fits(pipe)
    weights = loss_weights or LossWeights()
    settings = {
        "transfer_steps": transfer_steps,
        "steps": steps,
        "batch_size": batch_size,
        "transfer_learning_rate": transfer_learning_rate,
        "learning_rate": learning_rate,
        "loss_weights": asdict(weights),
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "layers": {layer.name: layer.processor.to_config() for layer in layers if layer.processor},
    }
    with _trainable(model, layers) as parameters:
        run = _Run(model, layers, parameters, samples, settings, output_dir, checkpoint_every)
        run.stage("transfer", transfer_steps, transfer_learning_rate, lambda batch: _transfer(run, batch))
        run.stage("end_to_end", steps, learning_rate, lambda batch: _end_to_end(run, batch, weights))
    write_json(output_dir / LOG_NAME, {"settings": settings, "curves": run.curves})
    recipe = {"function": "diffusers_linattn.distill", "num_samples": len(samples), **settings}
    del recipe["layers"]  # which the configuration describes
    save_linear_attention(pipe, output_dir, recipe=recipe, metrics=_last_losses(run.curves))
    (output_dir / CHECKPOINT_NAME).unlink(missing_ok=True)
    return run.curves


class _Run:
    """The state of one distillation: parameters, optimizer, position, curves."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[Layer],
        parameters: dict[str, nn.Parameter],
        samples: Samples,
        settings: dict[str, Any],
        output_dir: Path,
        checkpoint_every: int,
    ):
        self.model, self.layers, self.parameters, self.samples = model, layers, parameters, samples
        self.settings = settings
        self.path, self.checkpoint_every = output_dir / CHECKPOINT_NAME, checkpoint_every
        self.curves: dict[str, list[dict[str, float]]] = {"transfer": [], "end_to_end": []}
        self.resumed: dict[str, Any] | None = self._read_checkpoint()

    def stage(self, name: str, steps: int, learning_rate: float, losses: Callable[[Batch], dict[str, float]]) -> None:
        """Run one stage, or what is left of it; `losses` computes the losses of a batch and their gradients."""
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        if self.resumed is not None and self.resumed["stage"] == name:
            optimizer.load_state_dict(self.resumed["optimizer"])
            schedule.load_state_dict(self.resumed["schedule"])
            self.resumed = None
        curve = self.curves[name]
        progress = tqdm(range(len(curve), steps), desc=name.replace("_", " "), initial=len(curve), total=steps)
        for step in progress:
            batch = self._batch(name, step)
            row = losses(batch)
            if name == "end_to_end":
                torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings["max_grad_norm"])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            curve.append(row)
            progress.set_postfix(loss=f"{row['loss']:.4f}")
            if (step + 1) % self.checkpoint_every == 0 and step + 1 < steps:
                self._write_checkpoint(name, optimizer, schedule)

    def _batch(self, stage: str, step: int) -> Batch:
        # Each step's draws depend on its own number alone, so that a resumed run draws what an unbroken one would.
        key = f"{self.settings['seed']}/{stage}/{step}"
        draw = random.Random(key)
        groups = self.samples.groups
        group = draw.choices(groups, [len(group) for group in groups])[0]
        batch = self.samples.batch(draw.choices(group, k=self.settings["batch_size"]))
        generator = torch.Generator().manual_seed(random.Random(f"{key}/noise").getrandbits(60))
        latents = batch.latents.float()
        sigma = torch.rand(len(latents), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        self.target = (noise - latents).to(self.model.device)
        spread = sigma.view(-1, *[1] * (latents.ndim - 1))
        noisy = (1 - spread) * latents + spread * noise
        device, dtype = self.model.device, self.dtype
        # Flow-matching schedulers count timesteps as 1000 sigma.
        self.timestep = (sigma * 1000).to(device, dtype)
        return Batch(noisy, batch.arguments).to(device, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype; trained parameters are in fp32 whatever it is."""
        trained = {id(parameter) for parameter in self.parameters.values()}
        return next(
            (p.dtype for p in self.model.parameters() if p.is_floating_point() and id(p) not in trained), torch.float32
        )

    def predict(self, batch: Batch) -> torch.Tensor:
        """The transformer's prediction for a batch of noisy latents."""
        with self.autocast():
            return self.samples.call.predict(self.model, batch.latents, self.timestep, batch.arguments)

    def autocast(self) -> torch.autocast:
        """Autocast to the model's dtype when that is a low one."""
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.model.device.type, self.dtype if low else torch.bfloat16, enabled=low)

    def _write_checkpoint(self, stage: str, optimizer: Any, schedule: Any) -> None:
        state = {
            "settings": self.settings,
            "stage": stage,
            "parameters": {name: parameter.detach().cpu() for name, parameter in self.parameters.items()},
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "curves": self.curves,
        }
        write_atomically(self.path, lambda path: torch.save(state, path))

    def _read_checkpoint(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(
                f"{self.path} belongs to a distillation with other settings: give those again to go on with it, or "
                "another output_dir, or delete it."
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.curves = state["curves"]
        return state


def _transfer(run: _Run, batch: Batch) -> dict[str, float]:
    """Each layer on the teacher's input, towards the teacher's output; normalised so that layers weigh alike."""
    with original_attention(run.model), torch.no_grad(), _recorded(run.layers) as records:
        run.predict(batch)
    row = {}
    for layer in run.layers:
        args, kwargs, teacher = records.pop(layer.name)
        with run.autocast():
            student = _tensors(layer.attn(*args, **kwargs))
        ratios = [
            _mse(s, t) / t.float().square().mean().clamp_min(1e-12) for s, t in zip(student, teacher, strict=True)
        ]
        loss = torch.stack(ratios).sum()
        loss.backward()
        row[layer.name] = float(loss.detach())
    return {"loss": sum(row.values()) / len(row), **row}


def _end_to_end(run: _Run, batch: Batch, weights: LossWeights) -> dict[str, float]:
    with original_attention(run.model), torch.no_grad(), _recorded(run.layers) as teachers:
        teacher = run.predict(batch)
    with _recorded(run.layers) as students:
        student = run.predict(batch)
    attention = [
        torch.stack([_mse(s, t) for s, t in zip(students[name][2], teachers[name][2], strict=True)]).mean()
        for name in teachers
    ]
    terms = {
        "diffusion": _mse(student, run.target),
        "prediction": _mse(student, teacher),
        "attention": torch.stack(attention).mean(),
    }
    loss = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
    loss.backward()
    return {"loss": float(loss.detach())} | {name: float(term.detach()) for name, term in terms.items()}


Record = tuple[tuple[Any, ...], dict[str, Any], list[torch.Tensor]]


@contextmanager
def _recorded(layers: Sequence[Layer]) -> Iterator[dict[str, Record]]:
    """Collects, by layer name, the inputs and outputs of the attention layers while the model runs."""
    records: dict[str, Record] = {}

    def hook_for(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            records[name] = (args, kwargs, _tensors(output))

        return hook

    handles = [layer.attn.register_forward_hook(hook_for(layer.name), with_kwargs=True) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _trainable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[dict[str, nn.Parameter]]:
    """Only the parameters that are trained require gradients, in fp32; afterwards all is as it was but trained."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    parameters: dict[str, nn.Parameter] = {}
    for layer in layers:
        assert layer.processor is not None
        weights = layer.processor.weights_of(layer.attn)
        trained = {name: weights[name] for name in weights if name.rsplit(".", 1)[0] in PROJECTIONS}
        layer.processor.keep_original_weights(layer.attn, trained)
        own = layer.processor.own_parameters()
        trained |= {f"processor.{name}": parameter for name, parameter in own.items()}
        parameters |= {f"{layer.name}.{name}": parameter for name, parameter in trained.items()}
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    was_training = model.training
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        model.eval()  # no dropout: the teacher's answer has to be reproducible
        yield parameters
    finally:
        model.train(was_training)
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _check(layers: Sequence[Layer], model: Any) -> None:
    if not layers:
        raise ValueError("No attention layer is converted: linearize(pipe, processor) first.")
    lora_to_save(model, [layer.attn for layer in layers])  # whether the result can be saved
    for layer in layers:
        if getattr(layer.attn, "fused_projections", False):
            raise ValueError(
                f"{layer.name} has fused projections, which would leave the trained to_q, to_k and to_v unused: call "
                "unfuse_qkv_projections() first."
            )


def _last_losses(curves: dict[str, list[dict[str, float]]], steps: int = 100) -> dict[str, float]:
    """The losses by name, averaged over the last steps of each stage; those of single layers are left out."""
    means: dict[str, float] = {}
    for stage, names in (("transfer", ["loss"]), ("end_to_end", ["loss", "diffusion", "prediction", "attention"])):
        for name in names if curves[stage] else []:
            label = stage if name == "loss" else f"{stage} {name}"
            means[f"{label} loss"] = fmean(row[name] for row in curves[stage][-steps:])
    return {label: mean for label, mean in means.items() if math.isfinite(mean)}


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [part for part in output if part is not None]


def _mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(student.float(), teacher.float())
