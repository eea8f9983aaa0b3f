"""`set_attn_processor` of pipelines and models: the diffusers idiom, extended to our processors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention import AttentionMixin

from diffusers_linattn.linearize import linearize
from diffusers_linattn.processors.base import BaseProcessor


def pipeline_set_attn_processor(self: Any, processor: Any) -> None:
    """Set the attention processor of a pipeline's transformer; see [`linearize`] for the processors of this library.

    Any other processor goes to the model's own `set_attn_processor`.
    """
    if _is_template(processor):
        linearize(self, processor)
        return
    model = getattr(self, "transformer", None) or getattr(self, "unet", None)
    if model is None:
        raise ValueError(f"{type(self).__name__} has neither a transformer nor a unet to set a processor on.")
    model.set_attn_processor(processor)


def install_set_attn_processor() -> None:
    """Add the method to pipelines and models, and teach the models that have it our processors. Runs once."""
    if "set_attn_processor" in vars(DiffusionPipeline):
        return
    DiffusionPipeline.set_attn_processor = pipeline_set_attn_processor  # type: ignore[attr-defined]
    stock = AttentionMixin.set_attn_processor

    @functools.wraps(stock)
    def on_attention_mixin(self: Any, processor: Any) -> None:
        if _is_template(processor):
            linearize(self, _by_layer(processor))
        else:
            stock(self, processor)

    def on_model(self: Any, processor: Any) -> None:
        """Set our processors on a model; others go to its own `set_attn_processor` where it has one."""
        if _is_template(processor):
            linearize(self, _by_layer(processor))
        elif isinstance(self, AttentionMixin):
            stock(self, processor)
        else:
            raise AttributeError(
                f"{type(self).__name__} has no set_attn_processor of its own: only the processors of "
                "diffusers_linattn can be set on it."
            )

    AttentionMixin.set_attn_processor = on_attention_mixin  # type: ignore[method-assign]
    # ModelMixin stands before AttentionMixin among the bases of a model, so this one serves both kinds.
    ModelMixin.set_attn_processor = on_model  # type: ignore[attr-defined]


def _is_template(processor: Any) -> bool:
    # A processor that already belongs to a layer comes from `attn_processors` and goes back as diffusers would put it.
    if isinstance(processor, Mapping):
        return any(_is_template(part) for part in processor.values())
    return isinstance(processor, BaseProcessor) and processor.is_template


def _by_layer(processor: Any) -> Any:
    if not isinstance(processor, Mapping):
        return processor
    # diffusers names processors "<layer>.processor" in its dicts.
    return {name.removesuffix(".processor"): part for name, part in processor.items()}
