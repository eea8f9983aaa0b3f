"""Samples that a pipeline makes itself, kept on disk: what its attention is distilled on."""

from diffusers_linattn.samples.encode import encode_images
from diffusers_linattn.samples.make import make_samples
from diffusers_linattn.samples.model_call import ModelCall
from diffusers_linattn.samples.reading import Batch, Samples
from diffusers_linattn.samples.recorder import ONE_TRANSFORMER


__all__ = ["ONE_TRANSFORMER", "Batch", "ModelCall", "Samples", "encode_images", "make_samples"]
