"""The weights that the authors of CLEAR published (Huage001/CLEAR): loose files for FLUX.1 without a configuration."""

from __future__ import annotations

import re
from typing import Any

from diffusers_linattn.linearize import Layer
from diffusers_linattn.models import supported_class
from diffusers_linattn.processors import ClearProcessor
from diffusers_linattn.sharing.safetensors_header import Header
from diffusers_linattn.sharing.saved_config import SavedConfig, SavedLayer


SUFFIXES = (".weight", ".bias")
POOL = "processor.spatial_weight"


def read_clear_layout(
    name: str, header: Header, model: Any, layers: list[Layer], given: ClearProcessor | None
) -> tuple[SavedConfig, dict[str, str]] | None:
    """Describe a file of CLEAR in our format.

    Args:
        name: Its name, which tells the settings: `clear_local_16_down_4.safetensors`.
        header: Its header.
        model: The transformer it is to be loaded into.
        layers: The transformer's attention layers.
        given: The settings, for a file of another name.

    Returns:
        The configuration, and the name in the file for each of our names. `None` if the tensors are not named as
        those of CLEAR.

    Raises:
        ValueError: Another model, unknown settings, or not exactly the tensors that these settings have.

    Example:
        >>> settings_in_name("clear_local_16_down_4.safetensors")
        ClearProcessor(window=16, down_factor=4, temporal_window=None, reset_projections=False, impl=None)
    """
    if not any(re.fullmatch(r"(single_)?transformer_blocks\.\d+\.attn\.to_q\.weight", key) for key in header.tensors):
        return None
    if supported_class(model) != "FluxTransformer2DModel":
        raise ValueError(f"{name} holds weights of CLEAR for FLUX.1, this model is a {type(model).__name__}.")
    processor = given or settings_in_name(name)
    if processor is None:
        raise ValueError(
            f"{name} holds weights of CLEAR and does not tell their settings, as clear_local_16_down_4.safetensors "
            "would: pass processor=ClearProcessor(window=..., down_factor=...)."
        )
    names: dict[str, str] = {}
    saved: dict[str, SavedLayer] = {}
    for layer in layers:
        # to_out of the single blocks is part of proj_out, behind the MLP: CLEAR leaves it alone.
        projections = [p for p in ("to_q", "to_k", "to_v", "to_out.0") if _has(layer.attn, p)]
        weights = tuple(p + suffix for p in projections for suffix in SUFFIXES)
        saved[layer.name] = SavedLayer(processor, weights)
        names |= {f"{layer.name}.{weight}": f"{layer.name}.{weight}" for weight in weights}
        if processor.down_factor > 1:
            names[f"{layer.name}.processor.pool.spatial_weight"] = f"{layer.name}.{POOL}"
    _check_names(name, set(names.values()), set(header.tensors), processor, given is not None)
    return SavedConfig(supported_class(model), saved), names


def settings_in_name(name: str) -> ClearProcessor | None:
    """The processor that a file name of CLEAR stands for."""
    match = re.fullmatch(r"clear_local_(\d{1,4})(?:_down_(\d{1,2}))?\.safetensors", name)
    if match is None:
        return None
    try:
        return ClearProcessor(window=int(match[1]), down_factor=int(match[2] or 1))
    except ValueError as error:
        raise ValueError(f"{name} stands for impossible settings: {error}") from error


def _check_names(name: str, expected: set[str], present: set[str], processor: ClearProcessor, given: bool) -> None:
    if expected == present:
        return
    missing, extra = sorted(expected - present), sorted(present - expected)
    pooled = any(key.endswith(POOL) for key in present)
    if pooled != (processor.down_factor > 1):
        told = "processor=" if given else "its name"
        raise ValueError(
            f"{name} has {'pooling weights' if pooled else 'no pooling weights'}, but {told} says "
            f"down_factor={processor.down_factor}. Pass processor=ClearProcessor(window=..., down_factor=...) as it "
            "was trained."
        )
    raise ValueError(
        f"{name} has {len(present)} tensors where this model needs {len(expected)} (missing: {missing[:3]}, extra: "
        f"{extra[:3]}). CLEAR's weights are for FLUX.1 with 19 double and 38 single blocks."
    )


def _has(attn: Any, projection: str) -> bool:
    try:
        attn.get_submodule(projection)
    except AttributeError:
        return False
    return True
