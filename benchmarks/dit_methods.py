"""DiT at its real sizes with random weights, by the attention that it has, and steps of it, for the GPU benchmarks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor

from diffusers_linattn import GLAProcessor, LinearProcessor, linearize
from diffusers_linattn.linearize import layers_of


# Heads, head_dim, layers; of LiT's forms the heads.
MODELS = {"S": (6, 64, 12), "B": (12, 64, 12), "XL": (16, 72, 28)}
LIT_HEADS = {"S": 2, "B": 3, "XL": 4}
PATCH = 16  # pixels of a token's side: the autoencoder's 8 times DiT's patch of 2
BATCH = {"training": 1, "inference": 2}
UNFUSED, SDPA, LINEAR, GATED, ONE_WAY = "unfused", "sdpa", "linear", "gated", "gated, one way"
BASELINES = (UNFUSED, SDPA)
BOTH = ("training", "inference")


@dataclass(frozen=True)
class Case:
    """A model at a size, the sides of its token grid being `side`."""

    model: str
    side: int
    methods: tuple[str, ...]
    passes: tuple[str, ...]
    layers: int | None = None  # None: all it has

    @property
    def num_layers(self) -> int:
        return self.layers or MODELS[self.model][2]

    @property
    def name(self) -> dict[str, Any]:
        pixels = PATCH * self.side
        return {"model": f"DiT-{self.model}/2", "pixels": pixels, "tokens": self.side**2, "layers": self.num_layers}


def make_model(case: Case, method: str, device: str, dtype: torch.dtype, impl: str | None = None) -> Any:
    heads, head_dim, _ = MODELS[case.model]
    torch.manual_seed(0)
    with torch.device(device):
        model = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=case.num_layers,
            out_channels=8,
            sample_size=2 * case.side,
        )
    model = torch.nn.Module.to(model.eval(), dtype)  # that of diffusers warns of modules to keep in fp32, of none
    if method == UNFUSED:
        for block in model.transformer_blocks:
            block.attn1.set_processor(AttnProcessor())
    elif method != SDPA:
        processors = {
            LINEAR: LinearProcessor(heads=LIT_HEADS[case.model], impl=impl),
            GATED: GLAProcessor(impl=impl),
            ONE_WAY: GLAProcessor(direction="alternate", impl=impl),
        }
        linearize(model, processors[method])
        # Gates start at 1 and convolutions at 0: give them something to do.
        for layer in layers_of(model):
            for parameter in layer.processor.own_parameters().values():
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_inputs(case: Case, batch: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(batch, 4, 2 * case.side, 2 * case.side, generator=generator, device=device).to(dtype)
    numbers = torch.arange(1, batch + 1, device=device)
    return {"hidden_states": latents, "timestep": 100 * numbers, "class_labels": numbers}


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    device = inputs["hidden_states"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return model(**inputs).sample.float().square().mean()


def train(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = loss_of(model, inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.no_grad()
def infer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).sample


def make_step(case: Case, method: str, name: str, device: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A model and a step of it."""
    dtype = torch.bfloat16 if name == "inference" and device == "cuda" else torch.float32
    model = make_model(case, method, device, dtype)
    inputs = make_inputs(case, BATCH[name], device, dtype)
    if name == "inference":
        return model, functools.partial(infer, model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    return model, functools.partial(train, model, optimizer, inputs)


@functools.cache
def check(model: str, method: str, device: str) -> None:
    """Attention outputs and gradients of ours against the reference on a small grid; raises if they differ."""
    case = Case(model, 12, (method,), BOTH, layers=4)  # of which one way scans in four directions
    ours, expected = (_attention_and_gradients(case, method, device, impl) for impl in (None, "reference"))
    for what, found, reference in zip(("outputs", "gradients"), ours, expected, strict=True):
        error = ((found - reference).norm() / reference.norm()).item()
        if not error < (0.05 if device == "cuda" else 1e-3):  # NaN included
            raise RuntimeError(f"{what} are off by {error:.1e}, nothing was timed")


def _attention_and_gradients(
    case: Case, method: str, device: str, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    model, outputs = make_model(case, method, device, torch.float32, impl), []
    for layer in layers_of(model):
        layer.attn.register_forward_hook(lambda *arguments: outputs.append(arguments[2].detach().float().flatten()))
    loss_of(model, make_inputs(case, 2, device, torch.float32)).backward()
    parameters = itertools.chain.from_iterable(layer.attn.parameters() for layer in layers_of(model))
    return torch.cat(outputs), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
