"""What conversion allocates. How long it takes, and what a converted call adds: benchmarks/wrapper_overhead.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_linattn import ClearProcessor, linearize, restore
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.processors.attention_call import AnswerAttention

import tiny
from model_cases.image_shapes import qwen, qwen_call


TEMPLATES = {"windows": ClearProcessor(window=2), **tiny.TRAINABLE}


class Allocations(TorchDispatchMode):
    """The bytes of every storage that is made, by kind of device."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that none is counted for another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {id_of(item) for item in [*args, *(kwargs or {}).values()] if isinstance(item, torch.Tensor)}
        for item in output if isinstance(output, tuple | list) else [output]:
            if isinstance(item, torch.Tensor) and id_of(item) not in given:
                self.storages[id_of(item)] = item.untyped_storage()
        return output

    def total(self, device: str) -> int:
        return sum(storage.nbytes() for storage in self.storages.values() if storage.device.type == device)


def id_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def own_bytes(model: Any) -> int:
    return sum(p.nbytes for layer in layers_of(model) for p in layer.processor.own_parameters().values())


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversion_allocates_the_weights_of_the_processors_alone(name: str) -> None:
    model = tiny.flux()
    before = {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()}
    with Allocations() as made:
        linearize(model, TEMPLATES[name])
    assert made.total("cpu") == own_bytes(model)
    assert (own_bytes(model) > 0) == (name != "windows")
    with Allocations() as made:
        restore(model)
    assert made.total("cpu") == 0
    assert {name: (p.data_ptr(), p._version) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversion_of_a_model_of_the_size_of_flux_without_memory(name: str) -> None:
    with torch.device("meta"):
        model = tiny.flux(
            num_layers=19,
            num_single_layers=38,
            num_attention_heads=24,
            attention_head_dim=128,
            joint_attention_dim=4096,
        )
    with Allocations() as made:
        linearize(model, TEMPLATES[name])
    assert len(layers_of(model)) == 57
    assert all(p.is_meta for p in model.parameters())
    assert made.total("cpu") == 0
    assert not [layer for layer in layers_of(model) if layer.processor.original_weights]


@torch.no_grad()
def test_a_mask_does_not_bring_the_mode_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # The mode is asked about every operation in its block, which costs as much as all else that conversion adds.
    model = linearize(qwen(), ClearProcessor(window=100))
    asked = []
    monkeypatch.setattr(AnswerAttention, "__torch_function__", lambda *args: asked.append(args))
    model(**qwen_call([(1, 4, 6)], text=7, lengths=[5, 7]).inputs)
    assert not asked
