"""Choosing layers: those that a mechanism imitates worst stay dense, and the pipeline is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES

from diffusers_linattn import ClearProcessor, LinearProcessor, choose_layers, distill, linearize, make_samples
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.samples import Samples

import tiny


CALL: dict[str, Any] = {"resolutions": [(32, 32)], "num_inference_steps": 2}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    pipe = tiny.flux_pipeline()
    directory = tmp_path_factory.mktemp("samples") / "flux"
    call = {**CALL, "call_arguments": {"max_sequence_length": 8}}
    return make_samples(pipe, ["a cat", "a dog"], directory, num_samples=4, **call)


def test_the_layers_that_lose_most_stay_dense(samples: Samples, tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    choice = choose_layers(pipe, ClearProcessor(window=100), samples, keep=0.25, steps=2, batch_size=2)
    assert max(choice.losses.values()) < 1e-9  # a window that covers everything loses nothing
    choice = choose_layers(pipe, LinearProcessor(), samples, keep=0.5, steps=4, batch_size=2)
    names = [layer.name for layer in layers_of(pipe)]
    assert list(choice.losses) == names
    assert choice.layers == [name for name in names if name not in choice.dense]
    assert len(choice.dense) == 2
    assert min(choice.losses[name] for name in choice.dense) >= max(choice.losses[name] for name in choice.layers)
    assert {name for name, processor in choice.mapping.items() if processor is None} == set(choice.dense)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(layer.processor is None for layer in layers_of(pipe))
    linearize(pipe, choice.mapping)
    curves = distill(pipe, samples, tmp_path / "student", transfer_steps=1, steps=1, batch_size=2)
    assert set(choice.layers) < set(curves["transfer"][0])


def test_prompts_are_dropped_only_where_distill_drops_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX with guidance distilled into it never predicts without a prompt, Lumina 2 has nothing for no prompt."""
    case = PIPELINES["Lumina2"]
    lumina = case.make()
    call = {"num_samples": 2, "resolutions": list(case.sizes[:1]), "num_inference_steps": 2}
    without = make_samples(lumina, list(case.prompts[:2]), tmp_path / "lumina", call_arguments=case.call, **call)
    assert not without.has_null
    choose_layers(lumina, LinearProcessor(), without, steps=2, batch_size=2, prompt_dropout=1.0)
    flux = tiny.flux_pipeline(guidance_embeds=True)
    distilled = make_samples(flux, ["a cat"], tmp_path / "flux", call_arguments={"max_sequence_length": 8}, **call)
    assert distilled.has_null
    batch, dropped = Samples.batch, []

    def noted(self: Samples, indices: Any, without_prompt: Any) -> Any:
        dropped.extend(without_prompt)
        return batch(self, indices, without_prompt)

    monkeypatch.setattr(Samples, "batch", noted)
    choose_layers(flux, LinearProcessor(), distilled, steps=2, batch_size=2, prompt_dropout=1.0)
    assert dropped == [False] * 4


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (1.0, "at least 0 and below 1, got 1.0"),
        (-0.1, "at least 0 and below 1"),
        (True, "at least 0 and below 1"),
        (0.95, "keep=0.95 leaves none of the 4 layers to convert"),
    ],
)
def test_shares_that_make_no_sense(samples: Samples, keep: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        choose_layers(tiny.flux_pipeline(), LinearProcessor(), samples, keep=keep)


def test_a_converted_pipeline_is_refused(samples: Samples) -> None:
    pipe = linearize(tiny.flux_pipeline(), LinearProcessor())
    with pytest.raises(ValueError, match=r"4 layers are converted already \(transformer_blocks.0.attn …\)"):
        choose_layers(pipe, LinearProcessor(), samples)
