"""A process of its own that makes samples: `python samples_process.py DIRECTORY`, or by accelerate launch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import diffusers_linattn.samples.plan as plan
from diffusers_linattn import make_samples

import tiny


PROMPTS = ["a cat", "a dog", "the red cat", "red letter", "dog"]
CALL: dict[str, Any] = {
    "num_samples": 20,
    "batch_size": 2,
    "resolutions": [(24, 32), (32, 16)],
    "num_inference_steps": 3,
    "call_arguments": {"max_sequence_length": 8},
}


def run(directory: str | Path) -> None:
    """Make samples in files of three each, so that there are several."""
    torch.set_num_threads(1)
    most = plan.MAX_PER_SHARD
    plan.MAX_PER_SHARD = 3
    try:
        make_samples(tiny.flux_pipeline(guidance_embeds=True), PROMPTS, directory, **CALL)
    finally:
        plan.MAX_PER_SHARD = most


if __name__ == "__main__":
    run(sys.argv[1])
