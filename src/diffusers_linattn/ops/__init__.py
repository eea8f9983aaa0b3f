"""The attention operators: validate, choose an implementation, call it."""

from diffusers_linattn.ops.gated import gated_linear_attention
from diffusers_linattn.ops.hybrid import hybrid_attention
from diffusers_linattn.ops.linear import linear_attention
from diffusers_linattn.ops.local import local_attention


__all__ = ["gated_linear_attention", "hybrid_attention", "linear_attention", "local_attention"]
