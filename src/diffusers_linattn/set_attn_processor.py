"""`set_attn_processor` of pipelines and models: the diffusers idiom, extended to our processors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention import AttentionMixin

from diffusers_linattn.linearize import (
    Layer,
    install,
    layers_of,
    linearize,
    not_a_processor,
    plan,
    restore,
    restore_layers,
    set_processor,
    transformers_of,
)
from diffusers_linattn.models import find_family
from diffusers_linattn.processors.base import BaseProcessor


def install_set_attn_processor() -> None:
    """Add the method to pipelines and models, and teach the models that have it our processors. Runs once."""
    if "set_attn_processor" in vars(DiffusionPipeline):
        return
    stock = AttentionMixin.set_attn_processor

    @functools.wraps(stock)
    def on_model(self: Any, processor: Any) -> None:
        _set_on_model(self, processor, stock if isinstance(self, AttentionMixin) else None)

    DiffusionPipeline.set_attn_processor = _set_on_pipeline  # type: ignore[attr-defined]
    AttentionMixin.set_attn_processor = on_model  # type: ignore[method-assign]
    # ModelMixin stands before AttentionMixin among the bases of a model; some models have it alone.
    ModelMixin.set_attn_processor = on_model  # type: ignore[attr-defined]


def _set_on_pipeline(self: Any, processor: Any) -> None:
    """Set the attention processor of a pipeline's transformers; see [`linearize`] for the processors of this library.

    Any other processor goes to the `set_attn_processor` of each transformer, or of the U-Net.
    """
    _check_given(processor)
    if _holds_ours(processor):
        models: list[Any] = list(transformers_of(self))
        if len(models) == 1:
            models[0].set_attn_processor(processor)
        else:
            linearize(self, processor)
        return
    held = [getattr(self, name, None) for name in ("transformer", "transformer_2", "unet")]
    if not any(held):
        raise ValueError(f"{type(self).__name__} has neither a transformer nor a unet to set a processor on.")
    for model in dict.fromkeys(model for model in held if model is not None):
        model.set_attn_processor(processor)


def _set_on_model(model: Any, processor: Any, stock: Any) -> None:
    _check_given(processor)
    if _holds_ours(processor):
        if isinstance(processor, Mapping):
            _set_mapping(model, processor)
        else:
            linearize(model, processor)
        return
    if stock is None:
        raise AttributeError(
            f"{type(model).__name__} has no set_attn_processor of its own: only the processors of diffusers_linattn "
            "can be set on it."
        )
    converted = [layer for layer in layers_of(model) if layer.processor] if find_family(model) is not None else []
    if converted:
        if isinstance(processor, Mapping):
            _set_mapping(model, processor)
            return
        if type(processor).__name__.startswith("Fused"):
            if all(isinstance(layer.attn.processor.original, type(processor)) for layer in converted):
                return  # they were fused before the conversion
            _drop_fused_projections(model)
            raise ValueError(
                "Fusing the projections of this model replaces its attention processors, the converted ones too: "
                "restore(model) first, fuse, then convert again."
            )
        restore(model)  # the weights of the layers as well, which the stock processors belong to
    stock(model, processor)


def _check_given(processor: Any) -> None:
    """Raise for what would fail, or be called, only when the model is: a class, a name, nothing at all."""
    for part in processor.values() if isinstance(processor, Mapping) else [processor]:
        in_dict = part is not processor
        if isinstance(part, type) or not (callable(part) or (part is None and in_dict)):
            raise ValueError(not_a_processor(part))


def _set_mapping(model: Any, mapping: Mapping[str, Any]) -> None:
    """A dict as diffusers knows it, "<layer>.processor" to processor, or patterns as [`linearize`] takes them.

    Converted layers that get a processor of another kind are restored first. The model's tracker stays, and warns at
    the next call: loaders of IP-Adapters set such dicts, and the user may not know.
    """
    layers = {layer.name: layer for layer in layers_of(model)}
    ours: dict[str, BaseProcessor | None] = {}
    others: dict[str, Any] = {}
    for name, processor in mapping.items():
        place = name.removesuffix(".processor")
        if processor is not None and not isinstance(processor, BaseProcessor):
            others[place] = processor
        elif place in layers:
            if not _keeps(layers[place], processor):
                _check_still_trained(place, processor)
                ours[place] = processor
        elif not (name.endswith(".processor") and _is_attention(model, place)):
            ours[place] = processor  # else cross-attention, which no mechanism replaces
    strangers = [place for place in others if not _is_attention(model, place)]
    if strangers:
        raise ValueError(f"{type(model).__name__} has no attention layer {strangers[0]!r}.")
    planned = plan(model, ours) if ours else []
    restore_layers([*(layers[place] for place in others if place in layers), *(layer for layer, _ in planned)])
    for place, processor in others.items():
        attn: Any = model.get_submodule(place)
        if attn.processor is not processor:
            set_processor(attn, processor)
    install(planned)
    for layer, built in planned:
        given = ours.get(layer.name)
        if built is not None and given is not None and not given.is_template:
            built.load_state_dict(given.state_dict())


def _keeps(layer: Layer, processor: BaseProcessor | None) -> bool:
    """Whether setting `processor` leaves a layer as it is.

    Loaders of IP-Adapters give the layers that they have nothing for a `processor.__class__()`. Of the class of an
    installed processor, which is made for the layers of one model, no user makes such an instance.
    """
    if processor is None:
        return False
    of_class = processor.is_template and type(processor) is not processor.plain_class
    return layer.processor is processor or (of_class and type(layer.processor) is type(processor))


def _check_still_trained(place: str, processor: BaseProcessor | None) -> None:
    """Raise for an installed processor that was taken out together with the layer's weights that belong to it."""
    if processor is None or processor.is_template:
        return
    if processor.original_weights or processor.lora:
        raise ValueError(
            f"The {type(processor).__name__} for {place} belongs with trained projections, or a LoRA, that are not in "
            "this layer: restore() took the trained projections out, or they are in another model. Load the student "
            "again (load_linear_attention), or compare with original_attention(pipe), which puts them back."
        )


def _drop_fused_projections(model: Any) -> None:
    # diffusers fuses first and sets the processors last: a refusal has to take the fused weights away again.
    for module in model.modules():
        if getattr(module, "fused_projections", False):
            for name in ("to_qkv", "to_kv", "to_added_qkv"):
                module._modules.pop(name, None)
            module.fused_projections = False


def _is_attention(model: Any, name: str) -> bool:
    try:
        return hasattr(model.get_submodule(name), "processor")
    except AttributeError:
        return False


def _holds_ours(processor: Any) -> bool:
    if isinstance(processor, Mapping):
        return any(isinstance(part, BaseProcessor) for part in processor.values())
    return isinstance(processor, BaseProcessor)
