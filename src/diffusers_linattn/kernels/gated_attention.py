"""Gated linear attention in Triton as operators of `torch.library`: what is launched, on which memory.

The kernels read (batch, heads, tokens, channels) tensors of any strides as long as the channels are adjacent, each
once and in its dtype, in the order of the path by arithmetic on the token's index. Triton is imported by the first
call.

Letters: B batch, H heads, L tokens of a grid, K features, V value columns, C tokens per chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from diffusers_linattn.kernels.launching import adjacent, empty_like, fp32_precision, strides_of
from diffusers_linattn.kernels.scan_paths import describe_path


CHUNK = 64
# Features and value columns that a program works on at a time: more need too many registers.
BLOCK_K, BLOCK_V = 16, 32
# Kernels of this kind with four gave wrong results on Hopper with Triton 3.4 to 3.7; with two, products are those of
# `mma.sync`.
WARPS = 2
SCAN = (256, 4)  # elements of a state that a program follows, and chunks that it loads at a time
MAX_DIM = 256
IN_KERNEL_FEATURES = ("none", "relu", "elu")

# Bytes of memory for states per launch: heads beyond it wait for the next one.
_WORKSPACE = 2**30


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor gate"
_SETTINGS = "SymInt height, SymInt width, bool both, SymInt path, str query_features, str key_features, bool counted"


@torch.library.custom_op(
    "diffusers_linattn::gated_attention_triton",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)",
)
def gated_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    height: int,
    width: int,
    both: bool,
    path: int,
    query_features: str,
    key_features: str,
    counted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights times values over the scan of one grid, the token itself included, and the sums of the weights.

    query and key are (B, H, L, K) in raster order, value (B, H, L, V), gate (B, H, L, K or 1), read as at most 0.
    `query_features` and `key_features` are taken in the kernel: `"none"`, `"relu"` or `"elu"`. The sums are fp32
    (B, H, L, V) in the memory order of (B, L, H, V), the counts fp32 (B, H, L), or empty without `counted`.
    """
    call = _Call(query, key, value, gate, height, width, both, path, query_features, key_features, counted)
    sums, counts = empty_like(value, torch.float32), call.empty_counts()
    for heads in call.groups():
        states = heads.states(call.key, call.value, None)
        weights = heads.weights(states, counts)
        heads.output(call.query, call.value, weights, states, sums, call.query_features, gradient=False)
    return sums, counts


@gated_attention_triton.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    height: int,
    width: int,
    both: bool,
    path: int,
    query_features: str,
    key_features: str,
    counted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    counts = query.new_empty(query.shape[:3] if counted else (0,), dtype=torch.float32)
    return empty_like(value, torch.float32), counts


@torch.library.custom_op(
    "diffusers_linattn::gated_attention_triton_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor grad_counts, {_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def gated_attention_triton_backward(
    grad: torch.Tensor,
    grad_counts: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    height: int,
    width: int,
    both: bool,
    path: int,
    query_features: str,
    key_features: str,
    counted: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value and gate; the same bits in every run."""
    call = _Call(query, key, value, gate, height, width, both, path, query_features, key_features, counted)
    grad, grad_counts = adjacent(grad), grad_counts.contiguous()
    dquery, dkey, dvalue = empty_like(query), empty_like(key), empty_like(value)
    # A gate shared by all channels gets one part of its gradient per block of channels.
    dgate = query.new_empty(*query.shape[:3], call.key_blocks if call.scalar else query.shape[3], dtype=torch.float32)
    for heads in call.groups():
        states = heads.states(call.key, call.value, None)
        weights = heads.weights(states, None)
        grad_states = heads.states(call.query, grad, grad_counts, decays=states[2])
        heads.output(call.key, grad, weights, grad_states, dvalue, call.key_features, gradient=True)
        heads.gradients(grad, grad_counts, states, grad_states, dquery, dkey, dgate)
    dgate = dgate.sum(3, keepdim=True) if call.scalar else dgate
    return dquery, dkey, dvalue, dgate.to(gate.dtype)


@gated_attention_triton_backward.register_fake
def _(
    grad: torch.Tensor,
    grad_counts: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    return (
        *(empty_like(x) for x in (query, key, value)),
        torch.empty_like(gate, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _backward(ctx: Any, grad: torch.Tensor, grad_counts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = gated_attention_triton_backward(grad, grad_counts, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *[None] * 7)


gated_attention_triton.register_autograd(_backward, setup_context=_setup_context)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gate: torch.Tensor,
        height: int,
        width: int,
        both: bool,
        path: int,
        query_features: str,
        key_features: str,
        counted: bool,
    ) -> None:
        self.query, self.key, self.value, self.gate = (adjacent(x) for x in (query, key, value, gate))
        self.both, self.counted = both, counted
        self.query_features, self.key_features = query_features, key_features
        self.scalar = gate.shape[3] == 1 != query.shape[3]
        direction, order = describe_path(path, both)
        length = query.shape[2]
        self.chunks = -(-length // CHUNK)
        inner, outer = (1, height * width) if order == "rows" else (height, width)
        self.path = [self.chunks, length, inner, outer, int(direction == "backward")]
        # fp16 has neither the range of a state nor that of a gradient divided by a denominator: it takes tf32.
        self.dtype = torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32
        self.precision = "tf32" if value.dtype == torch.float16 else fp32_precision(query.device)
        self.key_blocks, self.value_blocks = -(-query.shape[3] // BLOCK_K), -(-value.shape[3] // BLOCK_V)

    def empty_counts(self) -> torch.Tensor:
        return self.query.new_empty(self.query.shape[:3] if self.counted else (0,), dtype=torch.float32)

    def groups(self) -> Iterator[_Heads]:
        """The heads of all samples, in groups whose states fit into the workspace."""
        per_head = self.chunks * self.query.shape[3] * self.value.shape[3] * self.dtype.itemsize * (1 + self.both)
        num_heads, step = self.query.shape[0] * self.query.shape[1], max(1, _WORKSPACE // max(1, per_head))
        for first in range(0, num_heads if self.chunks else 0, step):
            yield _Heads(self, first, min(step, num_heads - first))


States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Heads:
    """The launches for some of the heads: each returns what it writes."""

    def __init__(self, call: _Call, first: int, number: int) -> None:
        self.call, self.first, self.number = call, first, number

    def states(
        self, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor | None, decays: torch.Tensor | None = None
    ) -> States:
        """The states that leave each chunk, what they hold for values of 1, and the decay over each chunk.

        With `decays` from an earlier call, the gradients of states, from queries and gradients of the output.
        """
        call, gradient = self.call, decays is not None
        features = call.query_features if gradient else call.key_features
        key_dim, value_dim = key.shape[3], value.shape[3]
        shape = (1 + call.both, self.number, call.chunks, key_dim)
        states = key.new_empty(*shape, value_dim, dtype=call.dtype)
        counts = key.new_empty(shape if call.counted else (0,), dtype=torch.float32)
        if decays is None:
            decays = key.new_empty(*shape[1:3], call.gate.shape[3], dtype=torch.float32)
        from diffusers_linattn.kernels.gated_states import scan_kernel, states_kernel

        self._launch(
            states_kernel,
            call.key_blocks * call.value_blocks,
            [key, value, call.gate, counts if weight is None else weight, states, counts, decays],
            [key, value, call.gate],
            [key_dim, value_dim, BLOCK_K, BLOCK_V, CHUNK, call.scalar, call.both],
            [gradient, call.counted, features, call.precision],
        )
        left = int(gradient and not call.both)
        for x in (states, counts):
            if x.numel():
                columns = value_dim if x is states else 1
                grid = (-(-key_dim * columns // SCAN[0]), self.number, 1 + call.both)
                self._run(scan_kernel, grid, x, decays, call.chunks, left, key_dim, columns, call.scalar, *SCAN)
        return states, counts, decays

    def weights(self, states: States, totals: torch.Tensor | None) -> torch.Tensor:
        """Weights inside each chunk; the sums of all weights of a query go into `totals`."""
        from diffusers_linattn.kernels.gated_weights import weights_kernel

        call = self.call
        weights = call.query.new_empty(self.number, call.chunks, CHUNK, CHUNK, dtype=call.dtype)
        counted = call.counted and totals is not None
        self._launch(
            weights_kernel,
            2,
            [call.query, call.key, call.gate, states[1], weights, weights if totals is None else totals],
            [call.query, call.key, call.gate],
            [call.query.shape[3], BLOCK_K, CHUNK // 2, _levels(), call.scalar, call.both, counted],
            [call.query_features, call.key_features, call.precision],
        )
        return weights

    def output(
        self,
        query: torch.Tensor,
        value: torch.Tensor,
        weights: torch.Tensor,
        states: States,
        out: torch.Tensor,
        features: str,
        gradient: bool,
    ) -> None:
        from diffusers_linattn.kernels.gated_states import output_kernel

        call = self.call
        self._launch(
            output_kernel,
            call.value_blocks,
            [query, value, call.gate, weights, states[0], out],
            [query, value, call.gate, out],
            [query.shape[3], value.shape[3], BLOCK_K, BLOCK_V, CHUNK, call.scalar, call.both],
            [gradient, features, call.precision],
        )

    def gradients(
        self,
        grad: torch.Tensor,
        grad_counts: torch.Tensor,
        states: States,
        grad_states: States,
        dquery: torch.Tensor,
        dkey: torch.Tensor,
        dgate: torch.Tensor,
    ) -> None:
        from diffusers_linattn.kernels.gated_gradients import gradients_kernel, weight_gradients_kernel

        call = self.call
        grad_weights = grad.new_empty(self.number, call.chunks, CHUNK, CHUNK, dtype=call.dtype)
        self._launch(
            weight_gradients_kernel,
            1,
            [grad, call.value, grad_counts, grad_weights],
            [grad, call.value],
            [call.value.shape[3], BLOCK_V, CHUNK, call.counted, call.precision],
        )
        shared = [
            call.query.shape[3],
            call.value.shape[3],
            BLOCK_K,
            BLOCK_V,
            CHUNK // 2,
            _levels(),
            call.scalar,
        ]
        sides = (
            (call.query, call.key, grad, dquery, states, call.query_features, call.key_features),
            (call.key, call.query, call.value, dkey, grad_states, call.key_features, call.query_features),
        )
        for of_key, (own, other, factor, target, ours, *features) in enumerate(sides):
            self._launch(
                gradients_kernel,
                call.key_blocks,
                [own, other, call.gate, factor, grad_counts, grad_weights, *ours[:2], *grad_states[:2], target, dgate],
                [own, other, call.gate, factor, target, dgate],
                [*shared, call.both, bool(of_key), call.counted, *features, call.precision],
            )

    def _launch(
        self, kernel: Any, blocks: int, tensors: list[torch.Tensor], strided: list[torch.Tensor], *constants: list[Any]
    ) -> None:
        strides = [stride for x in strided for stride in strides_of(x)]
        settings = [self.call.query.shape[1], self.first, *self.call.path]
        flat = [x for group in constants for x in group]
        self._run(kernel, (self.call.chunks, blocks, self.number), *tensors, *strides, *settings, *flat)

    def _run(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any) -> None:
        device = self.call.query.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            # Triton 3.10 turns the fusion of products and sums off unless asked for.
            kernel[grid](*arguments, num_warps=WARPS, num_stages=1, enable_fp_fusion=True)


def _levels() -> int:
    """How often half a chunk is cut into halves."""
    return (CHUNK // 2).bit_length() - 1
