"""Linear-cost attention for the diffusion transformers of diffusers: swap, distil, share."""

from diffusers_linattn.choose_layers import choose_layers
from diffusers_linattn.distill import distill
from diffusers_linattn.evaluate import evaluate
from diffusers_linattn.hub import find_linear_attention, push_linear_attention
from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.linearize import linearize, original_attention, restore
from diffusers_linattn.models import supported_models
from diffusers_linattn.ops import gated_linear_attention, hybrid_attention, linear_attention, local_attention
from diffusers_linattn.processors import ClearProcessor, GLAProcessor, HybridProcessor, LinearProcessor
from diffusers_linattn.samples import Samples, encode_images, make_samples
from diffusers_linattn.set_attn_processor import install_set_attn_processor
from diffusers_linattn.status import status
from diffusers_linattn.training.config import DistillConfig
from diffusers_linattn.version import __version__
from diffusers_linattn.weights import load_linear_attention, save_linear_attention


__all__ = [
    "ClearProcessor",
    "DistillConfig",
    "GLAProcessor",
    "HybridProcessor",
    "LinearProcessor",
    "Samples",
    "TokenLayout",
    "__version__",
    "choose_layers",
    "distill",
    "encode_images",
    "evaluate",
    "find_linear_attention",
    "gated_linear_attention",
    "hybrid_attention",
    "linear_attention",
    "linearize",
    "load_linear_attention",
    "local_attention",
    "make_samples",
    "original_attention",
    "push_linear_attention",
    "restore",
    "save_linear_attention",
    "status",
    "supported_models",
]

install_set_attn_processor()
