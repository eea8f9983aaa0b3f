"""Low-rank matrices beside the projections of converted layers: saved, loaded and taken away through peft.

peft is imported only for a model that has such matrices, or gets them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn


logger = logging.getLogger(__name__)

# The name in peft under which matrices are loaded. `restore` takes those of this name away, and no others.
LORA_NAME = "linear_attention"
# What `add_adapter` calls a new LoRA; those that `load_lora_weights` brings have other names.
TRAINED_NAME = "default"
# What to say of it where the weights beside it are asked for.
MERGED = "The LoRA {} is merged into the weights: call unfuse_lora() first."


@dataclass(frozen=True)
class LowRank:
    """The matrices added to one projection: W + scale * B @ A, A with `rank` rows."""

    rank: int
    scale: float


def lora_to_save(model: nn.Module, converted: Sequence[nn.Module]) -> str | None:
    """The name of the LoRA that is part of the conversion, `None` if there is none.

    It is the one named [`LORA_NAME`]; without that, the one that `add_adapter` makes to be trained, if it lies in
    converted layers only. Others were loaded, and are shared as what they are.

    Args:
        model: The transformer.
        converted: Its converted attention modules.

    Raises:
        ValueError: It is merged into the weights, gone from layers that were trained with it, or beside the layers of
            a processor.
    """
    for attn in converted:
        places: Any = attn.processor.lora  # type: ignore[union-attr]
        if gone := [place for place in places if LORA_NAME not in getattr(attn.get_submodule(place), "lora_A", ())]:
            layer = next(name for name, module in model.named_modules() if module is attn)
            raise ValueError(
                f'{layer}.{gone[0]} was trained with the LoRA "{LORA_NAME}", which is gone (unload_lora_weights and '
                "delete_adapters do this): the file would be another student. Load it again with "
                "load_linear_attention(), or convert the model anew with linearize()."
            )
    modules = [module for attn in converted for module in _wrapped(attn).values()]
    inside = {name for module in modules for name in module.lora_A}
    if not inside:
        return None
    places = {id(module) for module in modules}
    outside = {name for module in _wrapped(model).values() if id(module) not in places for name in module.lora_A}
    name = next((name for name in (LORA_NAME, TRAINED_NAME) if name in inside), None)
    if name == TRAINED_NAME and name in outside:
        name = None
    for other in sorted(inside - {name}):
        logger.warning("The LoRA %s is not part of what is saved: share it with save_lora_weights.", other)
    if name is not None and any(name in module.merged_adapters for module in modules):
        raise ValueError(MERGED.format(name))
    for place, module in _wrapped(model).items():
        if ".processor." in place and name in module.lora_A:
            raise ValueError(
                f"{place} belongs to a processor, and the LoRA {name} beside it cannot be saved: give add_adapter "
                'target_modules that are projections of the model, such as "attn.to_q".'
            )
        if ".processor." in place and module.merged_adapters:
            raise ValueError(f"{place}: {MERGED.format(', '.join(module.merged_adapters))}")
    return name


def lora_off(attn: nn.Module, places: Sequence[str]) -> str:
    """Why the LoRA that a converted layer was trained with takes no part in it, and what to do; empty if it does.

    Args:
        attn: The layer.
        places: The modules of it that the LoRA is beside.
    """
    if not places:
        return ""
    module = attrgetter(places[0])(attn)  # peft switches all modules of a model together
    if LORA_NAME not in getattr(module, "lora_A", ()):
        return (
            "is gone (unless it was fused into the weights before): load the student again with "
            "load_linear_attention(), or restore() the model. To take another LoRA away, use pipe.delete_adapters(...)"
        )
    if module.disable_adapters:
        return f'is disabled: call pipe.enable_lora(). pipe.set_adapters(["{LORA_NAME}"]) switches other LoRAs off'
    if module.merged_adapters:
        if LORA_NAME in module.merged_adapters:
            return ""
        others = ", ".join(module.merged_adapters)
        return f"takes no part while {others} is fused without it: call pipe.unfuse_lora(), then fuse both or none"
    if LORA_NAME not in module.active_adapters:
        names = ", ".join(f'"{name}"' for name in (LORA_NAME, *module.active_adapters))
        return f"is not active: call pipe.set_adapters([{names}])"
    return ""


def describe_lora(attn: nn.Module, name: str | None) -> dict[str, LowRank]:
    """Rank and scale of each low-rank pair of a layer, by the module it is added to.

    Raises:
        ValueError: Something other than plain low-rank matrices beside a linear projection, such as DoRA.
    """
    found = {}
    for place, module in _wrapped(attn).items():
        if name not in module.lora_A:
            continue
        plain = isinstance(module.lora_A[name], nn.Linear) and module.lora_B[name].bias is None
        if not plain or name in getattr(module, "lora_variant", {}):
            raise ValueError(f"{place}: only plain LoRA on linear projections can be saved, no DoRA and no bias.")
        found[place] = LowRank(module.lora_A[name].out_features, float(module.scaling[name]))
    return found


def lora_shapes(attn: nn.Module, lora: Mapping[str, LowRank]) -> dict[str, tuple[int, int]]:
    """The shapes that the matrices will have, under the names of [`lora_tensors`].

    Raises:
        ValueError: The layer has no such linear projection.
    """
    shapes = {}
    for place, low_rank in lora.items():
        try:
            module: Any = attn.get_submodule(place)
        except AttributeError:
            module = None
        module = getattr(module, "base_layer", module)
        if not hasattr(module, "in_features") or place.startswith("processor."):
            raise ValueError(f"there is no linear projection {place} for a LoRA.")
        shapes[f"{place}.lora_A.weight"] = (low_rank.rank, int(module.in_features))
        shapes[f"{place}.lora_B.weight"] = (int(module.out_features), low_rank.rank)
    return shapes


def lora_tensors(attn: nn.Module, name: str | None) -> dict[str, nn.Parameter]:
    """The matrices of a layer as peft names them in files: `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    return {
        f"{place}.{side}.weight": getattr(module, side)[name].weight
        for place, module in _wrapped(attn).items()
        if name in module.lora_A
        for side in ("lora_A", "lora_B")
    }


def add_lora(model: Any, lora: Mapping[str, LowRank], *, converted: Collection[nn.Module] = ()) -> None:
    """Put low-rank matrices of the name [`LORA_NAME`] beside projections, active beside those that are active already.

    Args:
        model: The transformer.
        lora: By full module name.
        converted: Attention modules that may have matrices of this name already, which are left as they are.

    Raises:
        ValueError: peft is not installed, the name is taken, or other matrices are merged into a projection.
    """
    if not lora:
        return
    inside = {id(module) for attn in converted for module in _wrapped(attn).values()}
    for place, module in _wrapped(model).items():
        if LORA_NAME in module.lora_A and id(module) not in inside:
            raise ValueError(
                f'The model has a LoRA named "{LORA_NAME}" outside its converted layers, such as beside {place}, and '
                f'this name is needed: delete_adapters("{LORA_NAME}") or load that LoRA under another name.'
            )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("These weights hold a LoRA, which needs peft: pip install peft.") from error
    for place in lora:
        if merged := getattr(model.get_submodule(place), "merged_adapters", ()):
            raise ValueError(
                f"{place} has the LoRA {', '.join(merged)} fused into it, beside which peft applies no other: call "
                "unfuse_lora() first, and fuse_lora() again afterwards."
            )
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = {id(module): list(module.active_adapters) for module in _wrapped(model).values()}
    ranks = {place: low_rank.rank for place, low_rank in lora.items()}
    # peft computes a scale as alpha / rank, and does so again whenever adapters are set.
    alphas = {place: low_rank.rank * low_rank.scale for place, low_rank in lora.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(alphas.values()),  # type: ignore[arg-type]  # floats do
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=list(lora),
    )
    earlier = getattr(model, "peft_config", {}).get(LORA_NAME)
    inject_adapter_in_model(config, model, LORA_NAME)
    # peft keeps one configuration per name; a pattern, which only others write, cannot be joined with names.
    if earlier is not None and not isinstance(earlier.target_modules, str):
        config.target_modules |= earlier.target_modules
        config.rank_pattern |= earlier.rank_pattern
        config.alpha_pattern |= earlier.alpha_pattern
    model._hf_peft_config_loaded = True
    for place, module in _wrapped(model).items():
        names = active.get(id(module), [])
        if place in lora:
            names = [*names, LORA_NAME]
        module.set_adapter(names)
    # peft freezes everything else and thaws what it activates.
    for parameter in model.parameters():
        parameter.requires_grad_(flags.get(parameter, False))


def remove_lora(model: Any, attn: nn.Module) -> tuple[str, ...]:
    """Take what [`add_lora`] added out of one layer, and its name out of the model with the last of it.

    Returns:
        The modules of the layer that it was beside.
    """
    if LORA_NAME not in getattr(model, "peft_config", {}):
        return ()
    removed: tuple[str, ...] = ()
    for place, module in _wrapped(attn).items():
        if LORA_NAME not in module.lora_A:
            continue
        module.delete_adapter(LORA_NAME)
        removed += (place,)
        if not module.lora_A:
            parent, _, child = place.rpartition(".")
            setattr(attn.get_submodule(parent), child, module.base_layer)
    if not any(LORA_NAME in module.lora_A for module in _wrapped(model).values()):
        del model.peft_config[LORA_NAME]
        if not model.peft_config:
            del model.peft_config
            model._hf_peft_config_loaded = False
    return removed


@contextmanager
def lora_switched_off(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context the layers run without the matrices of [`LORA_NAME`]."""
    switched = []
    for attn in layers:
        for module in _wrapped(attn).values():
            if LORA_NAME in module.active_adapters:
                switched.append((module, list(module.active_adapters)))
    flags = [(p, p.requires_grad) for module, _ in switched for p in module.parameters()]
    try:
        for module, names in switched:
            module.set_adapter([name for name in names if name != LORA_NAME])
        yield
    finally:
        for module, names in switched:
            module.set_adapter(names)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def fused_loras(attn: nn.Module) -> frozenset[tuple[str, str]]:
    """The LoRAs that are fused into the weights of a layer, as (module, LoRA) names."""
    loras = ((name, getattr(module, "merged_adapters", None) or ()) for name, module in attn.named_modules())
    return frozenset((name, lora) for name, merged in loras for lora in merged)


def check_fused(attn: nn.Module, then: frozenset[tuple[str, str]] | None) -> None:
    """Raise if the original weights of a converted layer cannot be put back because of LoRAs fused into it.

    Args:
        attn: The layer.
        then: What was fused when its original weights were kept; `None` if none were.

    Raises:
        ValueError: [`LORA_NAME`] is fused, which takes its part out with rounding only, or others than then.
    """
    fused = fused_loras(attn)
    if any(lora == LORA_NAME for _, lora in fused):
        raise ValueError(MERGED.format(LORA_NAME))
    if then is not None and fused != then:
        now, before = (", ".join(sorted({lora for _, lora in at})) or "none" for at in (fused, then))
        raise ValueError(
            "The LoRAs fused into this layer are not those from when its original weights were kept: "
            f"{now} instead of {before}. Call unfuse_lora(), or fuse_lora() with the same ones, first."
        )


def _wrapped(module: nn.Module) -> dict[str, Any]:
    """The submodules that peft has wrapped for LoRA, by name; told by their attributes, so as not to import peft."""
    return {
        name.replace(".base_layer", ""): part
        for name, part in module.named_modules()
        if hasattr(part, "lora_A") and hasattr(part, "base_layer")
    }
