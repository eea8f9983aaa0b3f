"""Calls a stock processor with only its attention call under our mode.

A mode is asked about every operation inside its block, 74 in a layer of FLUX, and adds half to the time of a small
call. So outside of compiled code the stock processor's own code runs with two of its global names bound to something
else: `dispatch_attention_fn` and `F`. Everything else is looked up where the original looks it up.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F

from diffusers_linattn.processors.attention_call import AnswerAttention


class _Calls(threading.local):
    """The mode of the stock call that this thread is in."""

    mode: AnswerAttention | None = None


_calls = _Calls()


def call_stock(function: Callable[..., Any], mode: AnswerAttention, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, which comes from [`attention_only`], with its attention calls under `mode`."""
    outer, _calls.mode = _calls.mode, mode
    try:
        return function(*args, **kwargs)
    finally:
        _calls.mode = outer


@functools.cache
def attention_only(call: Callable[..., Any]) -> Callable[..., Any] | None:
    """`call` (the `__call__` of a stock processor's class, or a function) for [`call_stock`].

    `None` if its attention call does not stand in its own code under one of the two names, but in a helper of it.
    """
    if not isinstance(call, FunctionType):
        return None
    own = call.__globals__
    if "F" in own and own["F"] is not F or not _makes_call(call):
        return None
    if "scaled_dot_product_attention" in call.__code__.co_names and "F" not in call.__code__.co_names:
        return None  # spelled out as torch.nn.functional
    helpers = [own.get(name) for name in call.__code__.co_names if name not in _CALLS]
    if any(_makes_call(helper) for helper in helpers if isinstance(helper, FunctionType)):
        return None

    def dispatch_attention_fn(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        mode = _calls.mode
        if mode is None:
            return own["dispatch_attention_fn"](query, key, value, *args, **kwargs)
        mask = kwargs.get("attn_mask")
        if not args and (mask is None or mask.ndim == 4) and not kwargs.get("attention_kwargs"):
            # What the native implementation comes down to; masks of fewer dimensions have forms of their own there.
            named = {name: kwargs[name] for name in _ARGUMENTS if name in kwargs}
            output = mode.answer(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **named)
            return output.transpose(1, 2)
        with mode:
            return own["dispatch_attention_fn"](query, key, value, *args, **kwargs)

    bound = {"dispatch_attention_fn": dispatch_attention_fn, "F": _Functional()}
    globals_ = _Globals(own, {name: value for name, value in bound.items() if name in own})
    function = FunctionType(call.__code__, globals_, call.__name__, call.__defaults__, call.__closure__)
    function.__kwdefaults__ = call.__kwdefaults__
    return function


_ARGUMENTS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_CALLS = ("scaled_dot_product_attention", "dispatch_attention_fn")


def _makes_call(function: FunctionType) -> bool:
    return any(name in function.__code__.co_names for name in _CALLS)


class _Globals(dict[str, Any]):
    """A module's global names, some of them bound to something else."""

    def __init__(self, module: dict[str, Any], bound: dict[str, Any]):
        # An import inside the function reads the first of these without asking `__missing__`.
        own = ("__name__", "__package__", "__spec__", "__builtins__")
        super().__init__(bound, **{name: module[name] for name in own if name in module})
        self.module = module

    def __missing__(self, name: str) -> Any:
        return self.module[name]


class _Functional:
    """`torch.nn.functional` with the attention call answered by the mode of the current stock call."""

    @staticmethod
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        if _calls.mode is None:
            return F.scaled_dot_product_attention(*args, **kwargs)
        return _calls.mode.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)
