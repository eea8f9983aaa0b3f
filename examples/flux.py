"""The same path for FLUX.1-dev from the Hub, on one GPU of 80 GB.

From CLEAR (arXiv 2412.16112): the window, the losses, 10,000 samples at guidance 3.5 and 10,000 steps of 32 samples.
Ours: the first 1,000 of these steps train each layer by itself, and two thirds of the samples are not square.
"""

import torch
from diffusers import FluxPipeline

from diffusers_linattn import ClearProcessor, distill, load_linear_attention, make_samples, restore, status


pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
pipe.set_attn_processor(ClearProcessor(window=16))

# A text file with one prompt per line; the original attention makes the samples.
samples = make_samples(
    pipe,
    "prompts.txt",
    "flux-samples",
    num_samples=10_000,
    resolutions=[(1024, 1024), (768, 1344), (1344, 768)],
    guidance_scale=3.5,
    num_inference_steps=28,
)
sizes = {"batch_size": 1, "gradient_accumulation_steps": 32, "gradient_checkpointing": True}
distill(pipe, samples, "flux-clear-w16", transfer_steps=1_000, steps=9_000, **sizes)

# What anyone else would do with the result: load it into the original model.
load_linear_attention(restore(pipe), "flux-clear-w16")
print(status(pipe))
pipe("a lighthouse in a storm, oil painting", height=2048, width=2048).images[0].save("lighthouse.png")
