"""What calls share with the CUDA graphs that are made of them."""

from __future__ import annotations

import pytest
import torch

from diffusers_linattn.kernels import cuda_graphs


CPU = torch.device("cpu")


class Mask:
    """A result; a number would be the same object in two results."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size


def test_results_are_kept_and_those_of_a_graph_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = False
    monkeypatch.setattr(cuda_graphs, "_captured", lambda device: captured)
    mask = cuda_graphs.keep_results(Mask, 2)
    first = mask(1, CPU)
    assert mask(1, CPU) is first
    captured = True
    assert mask(1, CPU) is first
    captured = False
    for size in (2, 3, 4):  # as many others as let go of it elsewhere
        mask(size, CPU)
    assert mask(1, CPU) is not first
    captured = True
    assert mask(1, CPU) is first


def test_nothing_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = True
    monkeypatch.setattr(cuda_graphs, "_captured", lambda device: captured)
    mask = cuda_graphs.keep_results(Mask, 2)
    with pytest.raises(ValueError, match="make one call of the same size before"):
        mask(1, CPU)
    captured = False
    made = mask(1, CPU)
    captured = True
    assert mask(1, CPU) is made
