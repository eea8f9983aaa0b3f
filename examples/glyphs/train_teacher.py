"""Train the glyph teacher: a small FluxPipeline that draws boards of letters, from nothing, on a CPU or a GPU.

    python examples/glyphs/train_teacher.py --output teacher

Three stages: the autoencoder, the latents of every board, and the transformer by flow matching in FLUX's convention.
The same command run again keeps the stages that are done and goes on from the last checkpoint of the transformer. The
pipeline, with the moving average of the weights, is exported every few minutes to `OUTPUT/export`, and at the end in
half precision to `OUTPUT/pipeline`; `FluxPipeline.from_pretrained` opens both. The learning rate falls to zero at the
end of `--steps`, or of `--minutes` where given (then the speed of the machine decides the steps).
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

import torch
from autoencoder import train_autoencoder
from boards import LETTERS, all_specs, draw, prompt
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from text import TOKENS, WIDTH, TextEncoders, build_text_encoders
from torch import nn
from torch.nn import functional
from tqdm import tqdm


SHIFT = 2.0
EMA_DECAY = 0.999
CHECKPOINT = "training.pt"


def build_transformer(latent_channels: int) -> FluxTransformer2DModel:
    """FLUX in small: two double blocks, six single ones, four heads of 32; zero where training starts from nothing."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    # diffusers leaves out the adaLN-zero initialisation: every block starts as the identity.
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    modulations += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in [*modulations, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_pipeline(vae: AutoencoderKL, text: TextEncoders, transformer: FluxTransformer2DModel) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text.clip,
        tokenizer=text.clip_tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
        transformer=transformer,
    )


@torch.no_grad()
def encode_boards(vae: AutoencoderKL, file: Path) -> torch.Tensor:
    """The packed latents (boards, 256, 16) of every board, from `file` when it is there already."""
    if file.exists():
        return torch.load(file, weights_only=True)
    device = next(vae.parameters()).device
    parts, specs = [], all_specs()
    for start in tqdm(range(0, len(specs), 60), desc="latents"):
        images = draw(specs[start : start + 60]).to(device) * 2 - 1
        latents = (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        parts.append(FluxPipeline._pack_latents(latents, *latents.shape).half().cpu())
    packed = torch.cat(parts)
    save_atomically(packed, file)
    return packed


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


def export(pipeline: FluxPipeline, folder: Path) -> None:
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
    pipeline = FluxPipeline.from_pretrained(exported)
    pipeline.transformer.half()
    pipeline.vae.half()
    export(pipeline, folder)


@dataclass
class Data:
    """What a training step draws from: packed latents by board, and text embeddings by letter."""

    latents: torch.Tensor
    letters: torch.Tensor
    embeddings: torch.Tensor
    pooled: torch.Tensor
    text_ids: torch.Tensor
    image_ids: torch.Tensor

    @classmethod
    @torch.no_grad()
    def prepare(cls, pipeline: FluxPipeline, latents: torch.Tensor) -> Data:
        prompts = [prompt(letter) for letter in LETTERS]
        embeddings, pooled, text_ids = pipeline.encode_prompt(prompts, None, max_sequence_length=TOKENS)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, 16, 16, torch.device("cpu"), torch.float32)
        letters = torch.tensor([spec.letter for spec in all_specs()])
        return cls(latents, letters, embeddings.cpu(), pooled.cpu(), text_ids.cpu(), image_ids)

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
        """Noisy boards with the arguments of the transformer, and the target."""
        index = torch.randint(len(self.latents), (size,), generator=generator)
        clean = self.latents[index].float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_sigmas(size, generator)
        letters = self.letters[index]
        tensors = {
            "hidden_states": torch.lerp(clean, noise, sigma[:, None, None]),
            "timestep": sigma,
            "encoder_hidden_states": self.embeddings[letters],
            "pooled_projections": self.pooled[letters],
            "txt_ids": self.text_ids,
            "img_ids": self.image_ids,
            "target": noise - clean,
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def draw_sigmas(size: int, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal noise levels, spread evenly over the quantiles of a batch and shifted as the scheduler shifts."""
    quantiles = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    sigma = torch.sigmoid(torch.special.ndtri(quantiles.clamp(1e-5, 1 - 1e-5)) * 1.2)
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def build_optimizers(model: nn.Module, name: str, rate: float) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices inside the blocks and AdamW for the rest."""
    inside = [p for key, p in model.named_parameters() if p.ndim == 2 and "blocks" in key and "norm" not in key]
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

    model: FluxTransformer2DModel
    average: FluxTransformer2DModel
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
    model = build_transformer(latent_channels).to(device)
    average = build_transformer(latent_channels).to(device).eval().requires_grad_(False)
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


def train_step(run: Run, forward: nn.Module, batch: dict[str, torch.Tensor], rate: float) -> float:
    device = batch["timestep"].device
    target = batch.pop("target")
    with torch.autocast(device.type, torch.bfloat16):
        predicted = forward(**batch, return_dict=False)[0]
    loss = functional.mse_loss(predicted.float(), target)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def train_transformer(run: Run, data: Data, arguments: argparse.Namespace, pipeline: FluxPipeline) -> None:
    device = next(run.model.parameters()).device
    forward = torch.compile(run.model) if arguments.compile else run.model
    progress = tqdm(initial=run.step, total=None if arguments.minutes else arguments.steps, desc="transformer")
    last_save = run.seconds
    while (fraction := run.fraction(arguments)) < 1:
        started = time.perf_counter()
        rate = arguments.rate * min(1.0, (run.step + 1) / 200) * (1 - fraction)
        batch = data.batch(arguments.batch, run.generator, device)
        with plain_attention(device):
            run.losses.append(train_step(run, forward, batch, rate))
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
    pipeline = build_pipeline(vae, build_text_encoders(arguments.seed), run.average)
    data = Data.prepare(pipeline, latents)
    export(pipeline, arguments.output / "export")
    train_transformer(run, data, arguments, pipeline)
    publish(arguments.output / "export", arguments.output / "pipeline")


if __name__ == "__main__":
    main()
