"""Caches that skip blocks or attention layers between steps: the same skips, and the same pictures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import TaylorSeerCacheConfig

from diffusers_linattn import ClearProcessor, linearize, restore
from diffusers_linattn.linearize import layers_of

import tiny


STEPS = 6
FLUX_CALL = {"prompt": "a cat", **tiny.FLUX_CALL, "num_inference_steps": STEPS}


def pyramid(pipe: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: int(pipe.current_timestep),
    )


CACHES: dict[str, Any] = {
    "FirstBlockCache": (tiny.flux_pipeline, FLUX_CALL, lambda pipe: FirstBlockCacheConfig(threshold=0.6)),
    "PyramidAttentionBroadcast": (tiny.flux_pipeline, FLUX_CALL, pyramid),
    "TaylorSeer": (
        tiny.flux_pipeline,
        FLUX_CALL,
        lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1),
    ),
}


def generate(pipe: Any, call: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """What is generated, and how often each attention layer was asked for its queries."""
    counts = [0] * len(layers_of(pipe))
    handles = []
    for i, layer in enumerate(layers_of(pipe)):

        def count(*_: Any, i: int = i) -> None:
            counts[i] += 1

        handles.append(layer.attn.to_q.register_forward_hook(count))
    output = tiny.generate(pipe, **call)
    for handle in handles:
        handle.remove()
    return output, counts


@pytest.mark.parametrize("first", ["cache", "conversion"])
@pytest.mark.parametrize("name", CACHES)
def test_a_covering_window_is_the_stock_model_under_the_same_cache(name: str, first: str) -> None:
    make, call, config = CACHES[name]
    plain, all_calls = generate(make(), call)
    assert all_calls == [STEPS] * len(all_calls)
    stock, pipe = make(), make()
    stock.transformer.enable_cache(config(stock))
    expected, calls = generate(stock, call)
    assert sum(calls) < sum(all_calls)
    assert not torch.equal(expected, plain)
    if first == "conversion":
        linearize(pipe, ClearProcessor(window=100))
    pipe.transformer.enable_cache(config(pipe))
    if first == "cache":
        linearize(pipe, ClearProcessor(window=100))
    for _ in range(2):
        output, converted_calls = generate(pipe, call)
        torch.testing.assert_close(output, expected, atol=2e-5, rtol=0)
        assert converted_calls == calls
    pipe.transformer.disable_cache()
    torch.testing.assert_close(generate(pipe, call)[0], plain, atol=2e-5, rtol=0)
    assert torch.equal(generate(restore(pipe), call)[0], plain)


@pytest.mark.parametrize("name", CACHES)
def test_other_mechanisms_differ_from_the_stock_model_under_a_cache_as_well(name: str) -> None:
    make, call, config = CACHES[name]
    # Not the pipeline itself: after a call without a cache, diffusers 0.40 finds no context for one.
    plain = generate(tiny.train(linearize(make(), tiny.TRAINABLE["linear"])), call)[0]
    stock, pipe = make(), tiny.train(linearize(make(), tiny.TRAINABLE["linear"]))
    for each in (stock, pipe):
        each.transformer.enable_cache(config(each))
    output, calls = generate(pipe, call)
    assert sum(calls) < STEPS * len(calls)
    assert not torch.allclose(output, generate(stock, call)[0], atol=1e-4)
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe, call)[0], plain)
