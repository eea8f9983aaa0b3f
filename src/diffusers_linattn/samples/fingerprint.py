"""A few numbers of each weight, by which a transformer is told from others of its class and configuration."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from diffusers_linattn.linearize import FUSED, is_quantized, layers_of
from diffusers_linattn.offloading import is_on_disk


VALUES = 4  # of each weight: changes are seldom at a single place

# A weight that was in fp16 has lost what is below half of its smallest number.
_ABSOLUTE = 2.0**-25
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # coarse to fine

Fingerprint = dict[str, list[float]]


@torch.no_grad()
def fingerprint(model: nn.Module) -> Fingerprint:
    """Numbers at fixed places of each weight that the original attention runs with, by name.

    Left out is what does not belong to the original, such as the weights of processors and LoRAs beside the model's
    own, and what cannot be read as it lies in memory: quantized weights, weights that wait on disk or on no device.

    Example:
        >>> fingerprint(pipe.transformer)["proj_out.bias"]  # doctest: +SKIP
        [0.0078125, -0.0115966796875, 0.0021514892578125, -0.00604248046875]
    """
    if is_on_disk(model):
        return {}
    weights = {name: weight for name, weight in _original_weights(model).items() if _is_readable(weight)}
    # One copy for all weights of a device: on a GPU each copy waits for what runs there.
    alike: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault((weight.device, weight.dtype), []).append(name)
    found: Fingerprint = {}
    for names in alike.values():
        parts = [_some_values(weights[name]) for name in names]
        values = torch.cat(parts).cpu().double().split([len(part) for part in parts])
        # JSON has neither NaN nor infinity; a pipeline with such weights is refused for what it makes.
        found |= {n: part.tolist() for n, part in zip(names, values, strict=True) if part.isfinite().all()}
    return found


def check_fingerprint(made: Fingerprint, now: Fingerprint, where: Path, exact: bool) -> None:
    """Raise at the first weight, of those in both fingerprints, that differs.

    Args:
        made: Of the transformer that made the samples.
        now: Of the pipeline's.
        where: Where the samples are.
        exact: Whether numbers must be equal, or may differ by what rounding to another dtype leaves.
    """
    for name in [name for name in made if name in now]:
        if made[name] != now[name] and (exact or not _same_but_rounded(made[name], now[name])):
            raise ValueError(
                f"{where} holds samples of a model with other weights: in {name} it has {made[name]}, the pipeline's "
                f"transformer {now[name]}. Make samples with this pipeline in another directory, or load the model "
                "that made these."
            )


def _original_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    # Fused projections are made from the single ones, which stay beside them.
    fused = [name for name, module in model.named_modules() if getattr(module, "fused_projections", False)]
    made_again = tuple(f"{name}.{projection}" for name in fused for projection in FUSED)
    weights: dict[str, torch.Tensor] = {
        _plain(name): parameter
        for name, parameter in model.named_parameters()
        if ".processor." not in name and ".lora_" not in name and not name.startswith(made_again)
    }
    for layer in layers_of(model):
        kept = layer.processor.original_weights if layer.processor else {}
        kept = {_plain(f"{layer.name}.{name}"): weight for name, weight in kept.items()}
        weights |= {name: weight for name, weight in kept.items() if name in weights}
    return weights


def _plain(name: str) -> str:
    """The name of a weight in a model without the modules that LoRA and torch.compile put around others."""
    return name.replace(".base_layer.", ".").replace("_orig_mod.", "")


def _is_readable(weight: torch.Tensor) -> bool:
    # fp8 is how layerwise casting and quantization store what was finer.
    return not weight.is_meta and weight.numel() > 0 and weight.dtype in _DTYPES and not is_quantized(weight)


def _some_values(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, (flat.numel() - 1) // (VALUES - 1))][:VALUES]


def _same_but_rounded(one: list[float], other: list[float]) -> bool:
    if len(one) != len(other):
        return False
    # The numbers themselves say what they were rounded to: a model in fp32 may have been in bf16 before.
    relative = max(_precision(one), _precision(other))
    return all(abs(a - b) <= relative * max(abs(a), abs(b)) + _ABSOLUTE for a, b in zip(one, other, strict=True))


def _precision(values: list[float]) -> float:
    """That of the coarsest dtype that holds these numbers."""
    exact = torch.tensor(values, dtype=torch.float64)
    return next(torch.finfo(dtype).eps for dtype in _DTYPES if torch.equal(exact.to(dtype).double(), exact))
