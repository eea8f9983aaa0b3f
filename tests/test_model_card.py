"""The card that is written into a repository: the Hub's rules for its YAML, what it says, and when it is ours."""

from __future__ import annotations

from typing import Any

import pytest
from hub_server import check_card
from huggingface_hub import ModelCard

from diffusers_linattn import ClearProcessor, GLAProcessor, LinearProcessor
from diffusers_linattn.lora import LowRank
from diffusers_linattn.sharing.model_card import gallery_of, is_untouched, license_of, write_card
from diffusers_linattn.sharing.saved_config import SavedConfig, SavedLayer


def config(**changes: Any) -> SavedConfig:
    layers = {
        "transformer_blocks.0.attn": SavedLayer(ClearProcessor(window=16), ("to_q.weight",)),
        "transformer_blocks.1.attn": SavedLayer(ClearProcessor(window=16), ("to_q.weight",)),
        "single_transformer_blocks.0.attn": SavedLayer(LinearProcessor(), (), {"to_q": LowRank(4, 1.0)}),
        "single_transformer_blocks.1.attn": SavedLayer(GLAProcessor()),
    }
    arguments: dict[str, Any] = {
        "transformer": "FluxTransformer2DModel",
        "layers": layers,
        "base_model": "black-forest-labs/FLUX.1-dev",
        "recipe": {"steps": 100},
        "metrics": {"FID": 13.25, "a|b\n<script>": 1},
    }
    return SavedConfig(**{**arguments, **changes})


WIDGET = [{"text": "a cat", "output": {"url": "images/000.png"}}]


@pytest.mark.parametrize("base", ["black-forest-labs/FLUX.1-dev", 'not an id") # [x](y)', None])
@pytest.mark.parametrize("widget", [None, WIDGET])
@pytest.mark.parametrize("license", [None, {"license": "apache-2.0", "license_name": None, "license_link": None}])
def test_the_yaml_keeps_the_rules_of_the_hub(base: Any, widget: Any, license: Any) -> None:
    text = write_card(config(base_model=base), "me/flux-clear", widget=widget, license=license)
    assert check_card(text) == []
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["tags"] == ["diffusers", "linear-attention", "diffusers-linattn", "flux", "clear", "gla", "linear"]
    assert not {"lora", "controlnet"} & set(data["tags"])
    known = base if base and "/" in base and " " not in base else None
    assert data.get("base_model") == known
    assert data.get("base_model_relation") == ("adapter" if known else None)
    assert "not an id" not in text
    assert data.get("widget") == widget


def test_what_it_says() -> None:
    text = write_card(config(), "me/flux-clear", widget=WIDGET)
    body = text.split("---\n", 2)[2]
    assert 'load_linear_attention(pipe, "me/flux-clear")' in body.split("```")[1]  # our own snippet comes first
    assert "| 2 | ClearProcessor(window=16, down_factor=1" in body
    assert "LoRA on to_q" in body
    assert "| steps | 100 |" in body
    assert "| FID | 13.25 |" in body
    assert "| a\\|b &lt;script> | 1 |" in body
    assert "It allows non-commercial use only" in body
    assert "flux-1-dev-non-commercial-license" in text
    for paper in ("2412.16112", "2501.12976", "2405.18428"):
        assert paper in body
    assert "No recipe is recorded" in write_card(config(recipe=None), "me/flux-clear")
    assert "## Results" not in write_card(config(metrics={}), "me/flux-clear")


def test_the_license_is_that_of_the_base_model() -> None:
    found = {"license": "other", "license_name": "sana-license", "license_link": "LICENSE.txt"}
    assert license_of("a/b", found)["license_link"] == "https://huggingface.co/a/b/blob/main/LICENSE.txt"
    for base in ("FLUX.1-dev", "FLUX.1-Kontext-dev", "FLUX.1-Fill-dev"):
        assert license_of(f"black-forest-labs/{base}", None)["license_name"] == "flux-1-dev-non-commercial-license"
    assert license_of("black-forest-labs/FLUX.1-schnell", None) == {}
    assert license_of("black-forest-labs/FLUX.1-dev", {"license": "mit"}) == {"license": "mit"}


def test_a_card_is_ours_until_somebody_edits_it() -> None:
    text = write_card(config(), "me/flux-clear", widget=WIDGET)
    assert text == write_card(config(), "me/flux-clear", widget=WIDGET)
    assert is_untouched(text)
    assert is_untouched(text.rstrip())
    assert gallery_of(text) == WIDGET
    for edited in (text.replace("13.25", "12.25"), text + "\nMore.\n", text.replace("library_name", "Library_name")):
        assert not is_untouched(edited)
    assert not is_untouched("# Mine")
