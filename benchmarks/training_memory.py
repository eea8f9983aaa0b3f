"""How much memory distillation takes beside the model: counted tensor by tensor, at a model's real size.

    python benchmarks/training_memory.py                 # PixArt-Σ, 0.6 B parameters, bf16, on the CPU

The weights are random and the picture is small, so that what is counted is weights, their copies and the optimizer's
state, not activations. Every tensor that is alive in the middle of a step end to end is counted once by its storage,
and put down to what it belongs to.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import PeftAdapterMixin

from diffusers_linattn import ClearProcessor, HybridProcessor, LinearProcessor, distill, linearize, make_samples
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.processors import BaseProcessor


PROCESSORS: dict[str, BaseProcessor] = {
    "window": ClearProcessor(window=8),
    "linear": LinearProcessor(),
    "hybrid": HybridProcessor(window=8),
}


class TransformerForLora(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):
    """PixArt's class takes no LoRAs in diffusers, which most others do; this one of the same size does."""


def build_pipeline(kind: Any) -> Any:
    """PixArt-Σ with its real transformer; the prompts are encoded beforehand, so that no text encoder is needed."""
    torch.manual_seed(0)
    with torch.device("meta"):
        transformer = kind(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            cross_attention_dim=1152,
            caption_channels=4096,
            sample_size=128,
            use_additional_conditions=False,
        )
    transformer = transformer.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).to(torch.bfloat16)
    pipe = diffusers.PixArtSigmaPipeline(None, None, vae, transformer, diffusers.DPMSolverMultistepScheduler())
    embeddings, mask = torch.randn(1, 8, 4096, dtype=torch.bfloat16), torch.ones(1, 8, dtype=torch.bfloat16)

    def encode_prompt(prompt: list[str], *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        count = len(prompt) if isinstance(prompt, list) else 1
        given = embeddings.expand(count, -1, -1), mask.expand(count, -1)
        return (*given, *given)

    pipe.encode_prompt = encode_prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe


def storages(tensors: Any) -> dict[int, int]:
    """Bytes by storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


class Count:
    """Counts what is alive at a moment of training, in bytes by kind."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.bytes: dict[str, int] = {}

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        gc.collect()
        layers = [layer for layer in layers_of(self.model) if layer.processor is not None]
        parameters = list(self.model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        kinds = {
            "model, without what is trained": storages(p for p in parameters if not p.requires_grad),
            "trained weights, fp32": storages(trained),
            "original weights of those": storages(
                weight for layer in layers for weight in layer.processor.original_weights.values()
            ),
            "gradients": storages(p.grad for p in trained if p.grad is not None),
            "optimizer": storages(
                v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)
            ),
        }
        self.bytes = {kind: sum(found.values()) for kind, found in kinds.items()}


def measure(name: str, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    pipe = build_pipeline(TransformerForLora if "rank" in options else diffusers.PixArtTransformer2DModel)
    model = pipe.transformer
    alone = sum(storages(model.parameters()).values())
    samples = make_samples(
        pipe,
        ["a"],
        folder / "samples",
        num_samples=1,
        batch_size=1,
        resolutions=[(64, 64)],
        num_inference_steps=1,
        guidance_scale=1.0,
        call_arguments={"use_resolution_binning": False, "clean_caption": False},
    )
    linearize(pipe, PROCESSORS[name])
    count, step = Count(model), torch.optim.AdamW.step

    def step_and_count(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        count(self)
        return result

    torch.optim.AdamW.step = step_and_count  # type: ignore[method-assign]
    try:
        distill(pipe, samples, folder / name, transfer_steps=0, steps=1, batch_size=1, **options)
    finally:
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
    return {"model alone": alone, **count.bytes, "total": sum(count.bytes.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "training_memory.json")
    arguments = parser.parse_args()
    runs = {
        "window, attention weights": ("window", {}),
        "linear, attention weights": ("linear", {}),
        "hybrid, its own weights": ("hybrid", {"trainable": "processors"}),
        "window, LoRA of rank 64": ("window", {"trainable": "lora", "rank": 64}),
    }
    report: dict[str, Any] = {
        "model": "PixArtTransformer2DModel, 28 layers of 16 x 72, random weights, bf16",
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "bytes": {},
    }
    for label, (name, options) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            found = report["bytes"][label] = measure(name, options, Path(folder))
        print(label, {kind: f"{value / 1e9:.3f} GB" for kind, value in found.items()}, flush=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")  # each run takes minutes


if __name__ == "__main__":
    main()
