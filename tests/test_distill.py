"""Samples and distillation on a tiny FLUX pipeline: learns, resumes, gives the original back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from diffusers_linattn import (
    ClearProcessor,
    LinearProcessor,
    distill,
    linearize,
    load_linear_attention,
    make_samples,
    restore,
)
from diffusers_linattn import distill as distill_function
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.samples import Samples

import tiny
from model_cases import CASES


PROMPTS = ["a cat", "a dog", "the red cat"]
CALL: dict[str, Any] = {
    "num_samples": 10,
    "batch_size": 4,
    "resolutions": [(24, 32), (32, 16)],
    "num_inference_steps": 2,
    "call_arguments": {"max_sequence_length": 8},
}
QUICK: dict[str, Any] = {"transfer_steps": 6, "steps": 6, "batch_size": 3, "checkpoint_every": 4}


@pytest.fixture
def pipe() -> Any:
    return tiny.flux_pipeline(guidance_embeds=True)


@pytest.fixture
def samples(pipe: Any, tmp_path: Path) -> Samples:
    return make_samples(pipe, PROMPTS, tmp_path / "samples", **CALL)


def test_pipelines_with_several_transformers_are_refused(samples: Samples, tmp_path: Path) -> None:
    make: Any = CASES["WanTransformer3DModel"].make
    parts = {"transformer": make(), "transformer_2": make(), "boundary_ratio": 0.9}
    pipe: Any = diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), **parts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="WanPipeline has 2 transformers: distillation covers pipelines with one"):
        make_samples(pipe, PROMPTS, tmp_path, **CALL)
    with pytest.raises(ValueError, match="WanPipeline has 2 transformers"):
        distill(pipe, samples, tmp_path, **QUICK)


@pytest.mark.parametrize(
    "template", [ClearProcessor(window=2, down_factor=2), LinearProcessor(feature_map="hedgehog")], ids=repr
)
def test_distillation_learns_saves_and_restores(pipe: Any, samples: Samples, tmp_path: Path, template: Any) -> None:
    state = copy.deepcopy(pipe.transformer.state_dict())
    flags = {name: p.requires_grad for name, p in pipe.transformer.named_parameters()}
    linearize(pipe, template)
    curves = distill(
        pipe,
        samples,
        tmp_path / "student",
        **{**QUICK, "transfer_steps": 40, "transfer_learning_rate": 1e-2, "learning_rate": 3e-3, "steps": 30},
    )
    transfer = [row["loss"] for row in curves["transfer"]]
    assert sum(transfer[-5:]) < 0.8 * sum(transfer[:5])
    assert {"loss", "diffusion", "prediction", "attention"} == set(curves["end_to_end"][0])
    assert set(curves["transfer"][0]) == {"loss", *(layer.name for layer in layers_of(pipe))}
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == [
        "linear_attention.safetensors",
        "linear_attention_config.json",
        "training_log.json",
    ]
    changed = {
        name
        for name, tensor in pipe.transformer.state_dict().items()
        if name in state and not torch.equal(tensor, state[name])
    }
    assert {name.split(".", 2)[2].rsplit(".", 1)[0] for name in changed} <= {
        f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert changed
    config = json.loads((tmp_path / "student" / "linear_attention_config.json").read_text())
    assert config["recipe"]["steps"] == 30
    assert config["recipe"]["num_samples"] == 10
    last = [row["prediction"] for row in curves["end_to_end"]]
    assert config["metrics"]["end_to_end prediction loss"] == pytest.approx(sum(last) / len(last))
    other = load_linear_attention(tiny.flux_pipeline(guidance_embeds=True), tmp_path / "student")
    with torch.no_grad():
        inputs = {**tiny.flux_inputs(), "guidance": torch.ones(2)}
        assert torch.equal(other.transformer(**inputs)[0], pipe.transformer(**inputs)[0])
    restore(pipe)
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert {name: p.requires_grad for name, p in pipe.transformer.named_parameters()} == flags


@pytest.mark.parametrize("stop_at", [4, 6, 11])
def test_an_interrupted_distillation_ends_the_same(
    samples: Samples, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def student() -> Any:
        return linearize(tiny.flux_pipeline(guidance_embeds=True), ClearProcessor(window=2, down_factor=2))

    distill(student(), samples, tmp_path / "whole", **QUICK)
    batch, drawn = Samples.batch, []

    def stops(self: Samples, *args: Any) -> Any:
        drawn.append(1)
        if len(drawn) == stop_at + 1:
            raise KeyboardInterrupt
        return batch(self, *args)

    monkeypatch.setattr(Samples, "batch", stops)
    with pytest.raises(KeyboardInterrupt):
        distill(student(), samples, tmp_path / "broken", **QUICK)
    distill(student(), samples, tmp_path / "broken", **QUICK)
    assert len(drawn) < 12 + stop_at + 1
    for name in ("linear_attention.safetensors", "training_log.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_a_bf16_pipeline_is_trained_in_fp32_and_stays_bf16(samples: Samples, tmp_path: Path) -> None:
    pipe = tiny.flux_pipeline(guidance_embeds=True).to(torch.bfloat16)
    linearize(pipe, LinearProcessor())
    distill(pipe, samples, tmp_path / "student", **QUICK)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    log = json.loads((tmp_path / "student" / "training_log.json").read_text())
    assert all(torch.tensor(row["loss"]).isfinite() for curve in log["curves"].values() for row in curve)


def test_distillation_refuses_what_it_cannot_do(pipe: Any, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No attention layer is converted"):
        distill(pipe, samples, tmp_path / "student", **QUICK)
    linearize(pipe, ClearProcessor(window=2))
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="has fused projections"):
        distill(pipe, samples, tmp_path / "student", **QUICK)
    assert callable(distill_function)
