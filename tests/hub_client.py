"""What tests of publishing and loading share: the client turned to a Hub of ours, and something to publish."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import OWNER, Hub, running_hub
from huggingface_hub import constants

from diffusers_linattn import ClearProcessor, linearize, push_linear_attention

import tiny


REPO = "me/flux-clear"
SOURCE = Path(__file__).resolve().parents[1] / "src"


@pytest.fixture(scope="session")
def running() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(running: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub, with the client of this process turned to it and a cache of its own."""
    running.clear()
    monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
    template = running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", OWNER)
    return running


def student(seed: int = 0, window: int = 2) -> Any:
    """A converted pipeline that says it came from the Hub, with weights of its own and one replaced base weight."""
    pipe = tiny.flux_pipeline()
    pipe.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    linearize(pipe, ClearProcessor(window=window, down_factor=2))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith("spatial_weight"):
                parameter.copy_(torch.rand_like(parameter))
        attn = pipe.transformer.transformer_blocks[0].attn
        attn.processor.keep_original_weights(attn, ["to_q.weight"])
        attn.to_q.weight.mul_(1.5)
    return pipe


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return getattr(model, "transformer", model)(**tiny.flux_inputs())[0]


def push(pipe: Any = None, **arguments: Any) -> Any:
    return push_linear_attention(pipe or student(), REPO, **arguments)


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """For a child process: the Hub as a user names it."""
    cleared = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {
        **cleared,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": OWNER,
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(Path(__file__).parent)]),
    }


def tiny_image() -> Any:
    from PIL import Image

    return Image.new("RGB", (8, 8), "red")
