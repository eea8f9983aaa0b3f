"""What video models are called with when their token layout cannot be known, or is not what it seems."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from diffusers_linattn import ClearProcessor, GLAProcessor, linearize, restore
from diffusers_linattn.tracker import find_tracker

from model_cases import CASES
from model_cases.video_packed import coordinates


def converted(name: str) -> Any:
    cls = name.split()[0]
    if not hasattr(diffusers, cls):
        pytest.skip(f"this diffusers has no {cls}")
    return linearize(CASES[name].make(), ClearProcessor(window=2))


def layout_of(model: Any, inputs: dict[str, Any]) -> str:
    model(**inputs)
    tracker = find_tracker(model)
    assert tracker is not None
    return str(tracker.last["joint"][0])


@torch.no_grad()
def test_skyreels_refuses_its_causal_mode() -> None:
    model = converted("SkyReelsV2Transformer3DModel")
    model._set_ar_attention(2)
    with pytest.raises(ValueError, match="Autoregressive SkyReels-V2 .num_frame_per_block=2.*causal_block_size=1"):
        model(**CASES["SkyReelsV2Transformer3DModel"].calls[0].inputs)


@pytest.mark.parametrize("name", ["LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"])
@torch.no_grad()
def test_ltx_says_when_its_tokens_are_not_the_grid(name: str) -> None:
    model = converted(name)
    inputs = {**CASES[name].calls[0].inputs, "num_frames": 3}
    with pytest.raises(ValueError, match=r"108 video tokens are not a grid of .* = \(3, 6, 9\)"):
        model(**inputs)
    shape = (2, 3, 108) if name == "LTXVideoTransformer3DModel" else (2, 3, 108, 2)
    with pytest.raises(ValueError, match="do not say which tokens are the video|do not fit"):
        model(**inputs, video_coords=torch.rand(*shape, generator=torch.Generator().manual_seed(0)))


@torch.no_grad()
def test_coordinates_in_windows_of_a_long_ltx_video() -> None:
    # LTXI2VLongMultiPromptPipeline: one frame of 1x1 by the numbers, the last frames in earlier places by coordinates.
    model = converted("LTXVideoTransformer3DModel conditions")
    inputs = dict(CASES["LTXVideoTransformer3DModel conditions"].calls[1].inputs)
    inputs |= {"num_frames": 1, "height": 1, "width": 1}
    coords = torch.cat([coordinates((3, 9, 6)), coordinates((1, 9, 6))], 1)
    inputs["video_coords"] = coords.expand(2, -1, -1)
    assert layout_of(model, inputs) == "image 3x9x6 + reference 1x9x6"


@torch.no_grad()
def test_condition_tokens_of_ltx2_that_are_no_grid_count_as_text() -> None:
    # LTX-2 DFR keeps only those tokens of a key frame that a tile sees.
    model = converted("LTX2VideoTransformer3DModel")
    inputs = dict(CASES["LTX2VideoTransformer3DModel"].calls[1].inputs)
    kept = [*range(3 * 9 * 6 + 9 * 6), *range(inputs["hidden_states"].shape[1] - 11, inputs["hidden_states"].shape[1])]
    inputs["hidden_states"] = inputs["hidden_states"][:, kept]
    inputs["video_coords"] = inputs["video_coords"][:, :, kept]
    assert layout_of(model, inputs) == "image 3x9x6 + reference 1x9x6 + reference 11"


@torch.no_grad()
def test_guidance_without_attention_in_ltx2() -> None:
    case = CASES["LTX2VideoTransformer3DModel"]
    config = dict(converted("LTX2VideoTransformer3DModel").config)
    torch.manual_seed(0)
    model: Any = diffusers.LTX2VideoTransformer3DModel.from_config({**config, "perturbed_attn": True}).eval()
    for mask in (None, torch.tensor([0.0, 1.0])):
        inputs = {**case.calls[0].inputs, "spatio_temporal_guidance_blocks": [0], "perturbation_mask": mask}
        expected = model(**inputs)[0]
        linearize(model, ClearProcessor(window=100))
        torch.testing.assert_close(model(**inputs)[0], expected)
        restore(model)


@torch.no_grad()
def test_convolved_input_in_the_decoder_of_motif() -> None:
    # The queries there are two videos, which reach the layer as two arguments.
    name = "MotifVideoTransformer3DModel"
    case, model = CASES[name], converted(name)
    linearize(model, GLAProcessor(), layers="single_transformer_blocks.*")
    inputs = case.calls[0].inputs
    expected = model(**inputs)[0]
    linearize(model, GLAProcessor(input_conv=True), layers="single_transformer_blocks.*")
    torch.testing.assert_close(model(**inputs)[0], expected)  # the convolution starts as the identity


REFUSED = {
    "AnyFlowFARTransformer3DModel": "FlexAttention",
    "Cosmos3OmniTransformer": "without a batch dimension",
    "Kandinsky6SRTransformer3DModel": "FlexAttention",
    "SanaWMLTX2RefinerTransformer3DModel": "not the size of the video",
    "WanAnimate2Transformer3DModel": "FlexAttention",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    model = object.__new__(getattr(diffusers, name))
    torch.nn.Module.__init__(model)
    with pytest.raises(ValueError, match=f"{name} cannot be converted: .*{REFUSED[name]}"):
        linearize(model, ClearProcessor(window=2))
