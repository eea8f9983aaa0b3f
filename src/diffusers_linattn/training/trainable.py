"""Which parameters a distillation trains, and the state of the model around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffusers_linattn.linearize import Layer, is_quantized
from diffusers_linattn.lora import (
    LORA_NAME,
    LowRank,
    add_lora,
    describe_lora,
    lora_off,
    lora_tensors,
    lora_to_save,
    remove_lora,
)
from diffusers_linattn.models import supported_class
from diffusers_linattn.models.projections import PROJECTIONS
from diffusers_linattn.processors.base import RandomInit
from diffusers_linattn.sharing.saved_config import SavedConfig, SavedLayer, check_readable
from diffusers_linattn.training.config import DistillConfig


def check_trainable(model: nn.Module, layers: Sequence[Layer], config: DistillConfig) -> None:
    """Raise, with the model untouched, if there is nothing that this configuration could train in these layers.

    Raises:
        ValueError: No converted layer, no weights to train, weights that cannot be trained as asked, or no peft.
    """
    if not layers:
        raise ValueError("No attention layer is converted: linearize(pipe, processor) first.")
    for layer in layers:
        if why := lora_off(layer.attn, layer.processor.lora):  # type: ignore[union-attr]
            raise ValueError(f'The LoRA "{LORA_NAME}" that {layer.name} was trained with {why}.')
        if getattr(layer.attn, "fused_projections", False):
            raise ValueError(
                f"{layer.name} has fused projections, which would leave the trained to_q, to_k and to_v unused: call "
                "unfuse_qkv_projections() first."
            )
    if config.trainable == "processors" and not any(layer.processor.own_parameters() for layer in layers):  # type: ignore[union-attr]
        kinds = sorted({type(layer.processor).__name__ for layer in layers})
        raise ValueError(
            f"trainable='processors' leaves nothing to train: {', '.join(kinds)} as configured adds no weights. Train "
            "the projections (trainable='attention') or a LoRA beside them (trainable='lora')."
        )
    if config.trainable == "attention":
        for layer in layers:
            for name, weight in _projection_weights(layer).items():
                if is_quantized(weight):
                    raise ValueError(
                        f"{layer.name}.{name} is quantized and cannot be trained itself: use trainable='lora', or "
                        "exclude the attention layers from quantization."
                    )
    if config.trainable == "lora":
        _check_lora(model, layers, config.rank)
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ValueError(
            "The model is offloaded by accelerate: call pipe.remove_all_hooks() and place it, then train."
        )


def _check_lora(model: nn.Module, layers: Sequence[Layer], rank: int) -> None:
    if not hasattr(model, "add_adapter"):
        raise ValueError(
            f"{type(model).__name__} does not take LoRAs in diffusers: use trainable='attention', or 'processors'."
        )
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ValueError("trainable='lora' needs peft: pip install peft.") from error
    ranks = {lora.rank for layer in layers for lora in describe_lora(layer.attn, LORA_NAME).values()}
    if other := ranks - {rank}:
        raise ValueError(
            f"The layers have a LoRA of rank {max(other)} already: give rank={max(other)} to train it further, or "
            "restore() first."
        )


def check_can_be_saved(model: nn.Module, layers: Sequence[Layer], config: DistillConfig) -> None:
    """Raise, before anything is trained, if what will be trained could not be saved and read again."""
    lora_to_save(model, [layer.attn for layer in layers])
    # Of the LoRA, only the rank is looked at.
    low_rank = {"to_q": LowRank(config.rank, 1.0)} if config.trainable == "lora" else {}
    saved = {layer.name: SavedLayer(layer.processor, lora=low_rank) for layer in layers if layer.processor is not None}
    check_readable(SavedConfig(supported_class(model), saved))


@contextmanager
def trained_parameters(
    model: nn.Module, layers: Sequence[Layer], config: DistillConfig
) -> Iterator[dict[str, nn.Parameter]]:
    """What is trained, by full name; a LoRA to be trained is added. If the context fails, all is as it was before."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    had_lora = {layer.name for layer in layers if describe_lora(layer.attn, LORA_NAME)}
    parameters: dict[str, nn.Parameter] = {}
    before: dict[str, torch.Tensor] = {}
    try:
        if config.trainable == "lora":
            _add_missing_lora(model, layers, had_lora, config)
        for layer in layers:
            parameters |= {f"{layer.name}.{name}": p for name, p in _trained_in(layer, config).items()}
        before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}
        yield parameters
    except BaseException:
        for name, value in before.items():
            parameters[name].data.copy_(value)
        for layer in layers if config.trainable == "lora" else ():
            if layer.name not in had_lora:
                remove_lora(model, layer.attn)
                layer.processor.lora = ()  # type: ignore[union-attr]
        raise
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(flags.get(parameter, False))


@contextmanager
def in_training(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within this context only these parameters require gradients, in fp32, and the model is in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    try:
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        model.eval()  # no dropout: the teacher's answer has to be reproducible
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtypes[name])


def _projection_weights(layer: Layer) -> dict[str, nn.Parameter]:
    assert layer.processor is not None
    weights = layer.processor.weights_of(layer.attn)
    return {name: weights[name] for name in weights if name.rsplit(".", 1)[0] in PROJECTIONS}


def _trained_in(layer: Layer, config: DistillConfig) -> Mapping[str, nn.Parameter]:
    """The trained parameters of one layer; the originals of those that `restore` has to give back are kept."""
    assert layer.processor is not None
    trained: dict[str, nn.Parameter] = {}
    if config.trainable == "attention":
        trained = _projection_weights(layer)
        layer.processor.keep_original_weights(layer.attn, trained)
    if config.trainable == "lora":
        trained = lora_tensors(layer.attn, LORA_NAME)
    own = layer.processor.own_parameters()
    return trained | {f"processor.{name}": parameter for name, parameter in own.items()}


def _add_missing_lora(model: Any, layers: Sequence[Layer], had_lora: set[str], config: DistillConfig) -> None:
    places = {}
    missing = [layer for layer in layers if layer.name not in had_lora]
    for layer in missing:
        for name, module in layer.attn.named_modules():
            linear = name.removesuffix(".base_layer")
            if linear in PROJECTIONS and isinstance(getattr(module, "base_layer", module), nn.Linear):
                places[f"{layer.name}.{linear}"] = LowRank(config.rank, 1.0)
    if not places and missing:
        raise ValueError(f"{missing[0].name} has no linear projection that a LoRA can stand beside.")
    with RandomInit(seed=config.seed):
        add_lora(model, places, converted=[layer.attn for layer in layers])
    for layer in layers:
        layer.processor.lora = tuple(describe_lora(layer.attn, LORA_NAME))  # type: ignore[union-attr]


def dtype_of(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> torch.dtype:
    """The model's dtype; trained parameters are in fp32 whatever it is."""
    ids = {id(parameter) for parameter in trained.values()}
    floats = (torch.float32, torch.bfloat16, torch.float16)
    dtypes = (p.dtype for p in model.parameters() if p.dtype in floats and id(p) not in ids)
    return next(dtypes, torch.float32)
