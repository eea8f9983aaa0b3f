"""Tensors that follow from the sizes of a call, kept from call to call, and for good where a CUDA graph reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def keep_results(make: Callable[..., Any], number: int) -> Callable[..., Any]:
    """`make`, whose last argument is a device, with its last `number` results kept.

    What a call takes from there while a CUDA graph is captured stays until the process ends: the graph reads it at
    every replay, whatever else has been made since.

    Raises:
        ValueError: By the function: it is first called so while a graph is captured. What was made then would hold
            nothing before the graph is replayed.
    """

    @functools.lru_cache(maxsize=number)
    def recent(*call: Any) -> Any:
        if _captured(call[-1]):
            raise ValueError(
                "Windowed attention was not yet called at this size and window, and a CUDA graph is being captured: "
                "make one call of the same size before."
            )
        return make(*call)

    kept = functools.cache(recent)

    def result(*call: Any) -> Any:
        return (kept if _captured(call[-1]) else recent)(*call)

    return result


def _captured(device: torch.device) -> bool:
    """Whether what runs on a device now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
