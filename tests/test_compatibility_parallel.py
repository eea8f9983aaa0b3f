"""Models that diffusers splits over devices are refused: with a process group of two of which one exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.hooks import tensor_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffusers_linattn import ClearProcessor, linearize, restore
from diffusers_linattn.linearize import layers_of

import tiny


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # diffusers asks for an accelerator; on the CPU alone we say that there is one.
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(tensor_parallel, "_SUPPORTED_TP_DEVICES", ("cpu",))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def context_parallel(model: Any) -> None:
    model.set_attention_backend("native")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))


def tensor_parallel_(model: Any) -> None:
    config = pytest.importorskip("diffusers.models._modeling_parallel").TensorParallelConfig
    model.enable_parallelism(config=config(tp_degree=2))


KINDS: dict[str, Any] = {"Context": context_parallel, "Tensor": tensor_parallel_}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_converted_model_that_is_split_is_refused_at_its_first_call(kind: str) -> None:
    model = linearize(tiny.flux(), ClearProcessor(window=2))
    expected = model(**tiny.flux_inputs())[0]
    assert expected.isfinite().all()
    KINDS[kind](model)
    with pytest.raises(NotImplementedError, match=rf"{kind} parallelism splits the .* restore\(model\)"):
        model(**tiny.flux_inputs())
    restore(model)
    assert all(layer.processor is None for layer in layers_of(model))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("kind", KINDS)
def test_converting_a_split_model_is_refused(kind: str) -> None:
    model = tiny.flux()
    KINDS[kind](model)
    before = dict(model.attn_processors)
    with pytest.raises(NotImplementedError, match=f"{kind} parallelism splits the"):
        linearize(model, ClearProcessor(window=2))
    assert dict(model.attn_processors) == before
