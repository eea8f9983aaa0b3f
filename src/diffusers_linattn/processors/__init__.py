"""Attention processors: what a user puts into a model."""

from diffusers_linattn.processors.base import AttentionCall, BaseProcessor
from diffusers_linattn.processors.clear import ClearProcessor
from diffusers_linattn.processors.gla import GLAProcessor
from diffusers_linattn.processors.hybrid import HybridProcessor
from diffusers_linattn.processors.linear import LinearProcessor


__all__ = ["AttentionCall", "BaseProcessor", "ClearProcessor", "GLAProcessor", "HybridProcessor", "LinearProcessor"]
