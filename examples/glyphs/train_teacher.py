"""Train a glyph teacher: a small pipeline that draws boards of letters, from nothing, on a CPU or a GPU.

    python examples/glyphs/train_teacher.py --output teacher
    python examples/glyphs/train_teacher.py --output pixart-teacher --form pixart

Three stages: the autoencoder, the latents of every board, and the transformer, in the form of FLUX or of PixArt-Σ.
The same command run again keeps the stages that are done and goes on from the last checkpoint of the transformer. The
pipeline, with the moving average of the weights, is exported every few minutes to `OUTPUT/export`, and at the end in
half precision to `OUTPUT/pipeline`; `DiffusionPipeline.from_pretrained` opens both. The learning rate falls to zero at
the end of `--steps`, or of `--minutes` where given (then the speed of the machine decides the steps).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flux_form
import pixart_form
import torch
from autoencoder import train_autoencoder
from boards import all_specs, draw
from diffusers import AutoencoderKL, DiffusionPipeline
from text import build_text_encoders
from torch import nn
from torch.nn import functional
from tqdm import tqdm


FORMS: dict[str, Any] = {"flux": flux_form, "pixart": pixart_form}
EMA_DECAY = 0.999
CHECKPOINT = "training.pt"


@torch.no_grad()
def encode_boards(vae: AutoencoderKL, file: Path) -> torch.Tensor:
    """The latents (boards, 4, 32, 32) of every board, from `file` when it is there already."""
    if file.exists():
        return torch.load(file, weights_only=True)
    device = next(vae.parameters()).device
    parts, specs = [], all_specs()
    for start in tqdm(range(0, len(specs), 60), desc="latents"):
        images = draw(specs[start : start + 60]).to(device) * 2 - 1
        latents = (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        parts.append(latents.half().cpu())
    latents = torch.cat(parts)
    save_atomically(latents, file)
    return latents


def save_atomically(value: object, file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    torch.save(value, partial)
    os.replace(partial, file)


def _forget_paths(folder: Path) -> None:
    """Take the place that the parts were loaded from out of the configs, where diffusers notes it."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def export(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline beside `folder` and put it in its place."""
    partial, old = (folder.with_name(folder.name + ending) for ending in (".partial", ".old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(partial)
    _forget_paths(partial)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def publish(exported: Path, folder: Path) -> None:
    """Write an exported pipeline again with its two large parts in half precision, which halves the files."""
    pipeline = DiffusionPipeline.from_pretrained(exported)
    pipeline.transformer.half()
    pipeline.vae.half()
    export(pipeline, folder)


def build_optimizers(model: nn.Module, name: str, rate: float) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside the blocks and AdamW for the rest."""
    outside = ("norm", "table")  # modulations: rows that are no maps from one space to another
    matrices = [(key, p) for key, p in model.named_parameters() if p.ndim == 2 and "blocks" in key]
    inside = [p for key, p in matrices if not any(part in key for part in outside)]
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]
    chosen = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_steps=5),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


@dataclass
class Run:
    """A training run: the model, its moving average, and how far it is."""

    model: nn.Module
    average: nn.Module
    optimizers: list[torch.optim.Optimizer]
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def save(self, file: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        save_atomically(state, file)

    def restore(self, file: Path) -> None:
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]

    def fraction(self, arguments: argparse.Namespace) -> float:
        """The share of the run that is done, by the clock or by the steps."""
        if arguments.minutes:
            return self.seconds / (60 * arguments.minutes)
        return self.step / arguments.steps

    def update_average(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)


def start_run(arguments: argparse.Namespace, latent_channels: int, device: torch.device) -> Run:
    torch.manual_seed(arguments.seed)
    form = FORMS[arguments.form]
    model = form.build_transformer(latent_channels).to(device)
    average = form.build_transformer(latent_channels).to(device).eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(arguments.seed)
    run = Run(model, average, build_optimizers(model, arguments.optimizer, arguments.rate), generator)
    if (arguments.output / CHECKPOINT).exists():
        run.restore(arguments.output / CHECKPOINT)
    return run


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return torch.softmax(scores.float(), -1).to(value.dtype) @ value


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, attention as two products: the backward of torch's fused kernel takes half of a step there."""
    fused = functional.scaled_dot_product_attention
    if device.type == "cpu":
        functional.scaled_dot_product_attention = _attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused


def train_step(run: Run, loss: torch.Tensor, rate: float) -> float:
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def train_transformer(run: Run, data: Any, arguments: argparse.Namespace, pipeline: DiffusionPipeline) -> None:
    device = next(run.model.parameters()).device
    forward = torch.compile(run.model) if arguments.compile else run.model
    progress = tqdm(initial=run.step, total=None if arguments.minutes else arguments.steps, desc="transformer")
    last_save = run.seconds
    while (fraction := run.fraction(arguments)) < 1:
        started = time.perf_counter()
        rate = arguments.rate * min(1.0, (run.step + 1) / 200) * (1 - fraction)
        batch = data.batch(arguments.batch, run.generator, device)
        with plain_attention(device):
            run.losses.append(train_step(run, FORMS[arguments.form].loss(forward, batch), rate))
        run.step += 1
        run.update_average()
        run.seconds += time.perf_counter() - started
        progress.update()
        if run.step % 50 == 0:
            recent = sum(run.losses[-200:]) / len(run.losses[-200:])
            progress.set_postfix(loss=f"{recent:.4f}", rate=f"{rate:.2e}", minutes=f"{run.seconds / 60:.1f}")
        if run.seconds - last_save > 60 * arguments.export_minutes:
            run.save(arguments.output / CHECKPOINT)
            export(pipeline, arguments.output / "export")
            last_save = run.seconds
    progress.close()
    run.save(arguments.output / CHECKPOINT)
    export(pipeline, arguments.output / "export")
    recent = sum(run.losses[-200:]) / len(run.losses[-200:])
    print(f"{run.step} steps in {run.seconds / 60:.1f} minutes, last loss {recent:.4f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and of the export")
    parser.add_argument("--form", choices=FORMS, default="flux", help="the architecture, and what it is trained for")
    parser.add_argument("--steps", type=int, default=5169, help="steps of the transformer")
    parser.add_argument("--minutes", type=float, help="end by the clock instead, after so many minutes")
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--export-minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    vae = train_autoencoder(arguments.output / "vae", arguments.vae_steps, arguments.seed, device)
    latents = encode_boards(vae, arguments.output / "latents.pt")
    run = start_run(arguments, vae.config.latent_channels, device)
    form = FORMS[arguments.form]
    pipeline = form.build_pipeline(vae, build_text_encoders(arguments.seed), run.average)
    data = form.Data.prepare(pipeline, latents)
    export(pipeline, arguments.output / "export")
    train_transformer(run, data, arguments, pipeline)
    publish(arguments.output / "export", arguments.output / "pipeline")


if __name__ == "__main__":
    main()
