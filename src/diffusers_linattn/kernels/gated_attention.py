"""Gated linear attention in Triton as operators of `torch.library`: what is launched, on which memory.

The kernels read (batch, heads, tokens, channels) tensors of any strides as long as the channels are adjacent, each
once and in its dtype, in the order of the path by arithmetic on the token's index. Triton is imported by the first
call.

Letters: B batch, H heads, L tokens of a grid, K features, V value columns, C tokens per chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from diffusers_linattn.kernels.launching import MAX_GRID, adjacent, empty_like, precision_of, run_kernel, strides_of
from diffusers_linattn.kernels.scan_paths import describe_path


CHUNK = 64
MAX_DIM = 256
IN_KERNEL_FEATURES = ("none", "relu", "elu")

# Bytes of memory for states, weights and decayed queries and keys: heads beyond it wait for the next launch.
_WORKSPACE = 2**31

# Features that a program works on at a time where it computes decays: more need too many registers.
BLOCK = 16
SCAN = (16, 64)  # rows and columns of a state that a program follows


def choose_warps(dtype: torch.dtype, precision: str) -> int:
    """Warps of a program for operands of a dtype, products of fp32 being in `"ieee"` arithmetic or in `"tf32"`."""
    # Products on tensor cores are those of `mma.sync` with two warps. Kernels of this kind with four, which multiply
    # otherwise, gave wrong results on Hopper with Triton 3.4 to 3.7. IEEE arithmetic needs registers.
    return 8 if _without_tensor_cores(dtype, precision) else 2


def state_blocks(dtype: torch.dtype, value_dim: int) -> tuple[int, int]:
    """Rows and columns of the states that a program makes, of operands of a dtype: as many as registers hold."""
    return 32, 128 if dtype == torch.bfloat16 and value_dim > 64 else 64


def output_blocks(dtype: torch.dtype, precision: str) -> tuple[int, int]:
    """Rows and columns of the states that a program multiplies by at a time: as many as registers hold."""
    return (32, 32) if _without_tensor_cores(dtype, precision) else (16, 64)


def _without_tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    return dtype == torch.float32 and precision == "ieee"


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor gate"
_SETTINGS = "SymInt height, SymInt width, bool both, SymInt path, str query_features, str key_features, bool counted"


@torch.library.custom_op(
    "diffusers_linattn::gated_attention_triton",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? initial_state, {_SETTINGS}) -> (Tensor, Tensor)",
)
def gated_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    initial_state: torch.Tensor | None,
    height: int,
    width: int,
    both: bool,
    path: int,
    query_features: str,
    key_features: str,
    counted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights times values over the scan of one grid, the token itself included, and the sums of the weights.

    query and key are (B, H, L, K) in raster order, value (B, H, L, V), gate (B, H, L, K or 1), at most 0;
    initial_state (B, H, K, V), with `both` (2, B, H, K, V), with `counted` one column more, the counts; `None` is 0.
    `query_features` and `key_features` are taken in the kernel: `"none"`, `"relu"` or `"elu"`. The sums are fp32
    (B, H, L, V) in the memory order of (B, L, H, V), the counts fp32 (B, H, L), or empty without `counted`.
    """
    call = _Call(
        query, key, value, gate, initial_state, height, width, both, path, query_features, key_features, counted
    )
    sums, counts = empty_like(value, torch.float32), call.empty_counts()
    for heads in call.groups(training=False):
        inside = heads.weights()
        states = heads.states(inside.keys, inside, call.value)
        heads.output(inside.queries, inside, call.value, states, sums, counts)
        del inside, states  # before the next group takes its memory
    return sums, counts


@gated_attention_triton.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    initial_state: torch.Tensor | None,
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
    schema=f"(Tensor grad, Tensor grad_counts, {_INPUTS}, Tensor? initial_state, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def gated_attention_triton_backward(
    grad: torch.Tensor,
    grad_counts: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    initial_state: torch.Tensor | None,
    height: int,
    width: int,
    both: bool,
    path: int,
    query_features: str,
    key_features: str,
    counted: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value, gate and initial state, empty without one; the same bits in every run."""
    call = _Call(
        query, key, value, gate, initial_state, height, width, both, path, query_features, key_features, counted
    )
    grad, grad_counts = adjacent(grad), grad_counts.contiguous()
    dquery, dkey, dvalue = empty_like(query), empty_like(key), empty_like(value)
    # A gate shared by all channels gets one part of its gradient per block of channels.
    dgate = query.new_empty(*query.shape[:3], call.key_blocks if call.scalar else query.shape[3], dtype=torch.float32)
    dinitial = query.new_empty((0,) if call.initial is None else call.initial.shape, dtype=torch.float32)
    for heads in call.groups(training=True):
        inside = heads.weights()
        states = heads.states(inside.keys, inside, call.value)
        grad_states = heads.states(inside.queries, inside, grad, grad_counts)
        heads.output(inside.keys, inside, grad, grad_states, dvalue)
        heads.gradients(grad, grad_counts, inside, states, grad_states, dquery, dkey, dgate)
        if call.initial is not None:
            heads.initial_gradient(grad_states, dinitial)
        del inside, states, grad_states
    dgate = dgate.sum(3, keepdim=True) if call.scalar else dgate
    if initial_state is not None:
        dinitial = dinitial.reshape(initial_state.shape).to(initial_state.dtype)
    return dquery, dkey, dvalue, dgate.to(gate.dtype), dinitial


@gated_attention_triton_backward.register_fake
def _(
    grad: torch.Tensor,
    grad_counts: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    initial_state: torch.Tensor | None,
    *_: object,
) -> tuple[torch.Tensor, ...]:
    others = (gate, grad.new_empty(0) if initial_state is None else initial_state)
    return (
        *(empty_like(x) for x in (query, key, value)),
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in others),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _backward(ctx: Any, grad: torch.Tensor, grad_counts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under gradient checkpointing it may not be asked again
    *gradients, dinitial = gated_attention_triton_backward(grad, grad_counts, *saved, *ctx.settings)
    return (*gradients, None if saved[4] is None else dinitial, *[None] * 7)


gated_attention_triton.register_autograd(_backward, setup_context=_setup_context)


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gate: torch.Tensor,
        initial_state: torch.Tensor | None,
        height: int,
        width: int,
        both: bool,
        path: int,
        query_features: str,
        key_features: str,
        counted: bool,
    ) -> None:
        self.query, self.key, self.value, self.gate = (adjacent(x) for x in (query, key, value, gate))
        self.initial = None
        if initial_state is not None:  # (2 | 1, heads of all samples, K, V | V + 1)
            heads = query.shape[0] * query.shape[1]
            self.initial = initial_state.float().reshape(1 + both, heads, *initial_state.shape[-2:])
        self.both, self.counted = both, counted
        self.query_features, self.key_features = query_features, key_features
        self.scalar = gate.shape[3] == 1 != query.shape[3]
        direction, order = describe_path(path, both)
        length = query.shape[2]
        self.chunks = -(-length // CHUNK)
        self.path = [self.chunks, length, height, width, int(direction == "backward"), order == "columns"]
        # fp16 has neither the range of a state nor that of a gradient divided by a denominator: it takes tf32.
        self.dtype = torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32
        self.precision = "tf32" if value.dtype == torch.float16 else precision_of(value)
        self.key_blocks = -(-query.shape[3] // BLOCK)
        self.warps = choose_warps(self.dtype, self.precision)

    def empty_counts(self) -> torch.Tensor:
        return self.query.new_empty(self.query.shape[:3] if self.counted else (0,), dtype=torch.float32)

    def groups(self, training: bool) -> Iterator[_Heads]:
        """The heads of all samples, in groups of about one size whose states fit into the workspace."""
        key_dim, value_dim = self.query.shape[3], self.value.shape[3]
        states = (self.chunks + 2) * (1 + self.both) * key_dim * value_dim * (1 + training)
        inside = self.chunks * CHUNK * ((1 + self.both) * key_dim * 2 + CHUNK * (1 + training))
        num_heads = self.query.shape[0] * self.query.shape[1]
        fitting = max(1, min(MAX_GRID, _WORKSPACE // ((states + inside) * self.dtype.itemsize)))
        step = max(1, -(-num_heads // max(1, -(-num_heads // fitting))))
        for first in range(0, num_heads if self.chunks else 0, step):
            yield _Heads(self, first, min(step, num_heads - first))


class _Inside(NamedTuple):
    """What a chunk is by itself: see `weights_kernel`."""

    weights: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    decays: torch.Tensor


# The states that leave each chunk, and what they hold for values of 1; before and behind them two places, of which the
# one where a direction begins has the state that it begins with.
_States = tuple[torch.Tensor, torch.Tensor]


class _Heads:
    """The launches for some of the heads: each returns what it writes."""

    def __init__(self, call: _Call, first: int, number: int) -> None:
        self.call, self.first, self.number = call, first, number

    def weights(self) -> _Inside:
        """Weights inside each chunk, queries and keys decayed to its ends, and the decay over it."""
        from diffusers_linattn.kernels.gated_weights import weights_kernel

        call, key_dim = self.call, self.call.query.shape[3]
        weights = call.query.new_empty(self.number, call.chunks, CHUNK, CHUNK, dtype=call.dtype)
        shape = (1 + call.both, self.number, 2 * call.chunks, CHUNK // 2, key_dim)
        queries, keys = (weights.new_empty(shape) for _ in range(2))
        decays = weights.new_empty(self.number, 2 * call.chunks, call.gate.shape[3], dtype=torch.float32)
        self._launch(
            weights_kernel,
            1,
            [call.query, call.key, call.gate, weights, queries, keys, decays],
            [call.query, call.key, call.gate],
            [key_dim, BLOCK, CHUNK // 2, _levels(), call.scalar, call.both],
            [call.query_features, call.key_features, call.precision],
        )
        return _Inside(weights, queries, keys, decays)

    def states(
        self, decayed: torch.Tensor, inside: _Inside, value: torch.Tensor, weight: torch.Tensor | None = None
    ) -> _States:
        """The states that leave each chunk, from decayed keys; with `weight` their gradients, from decayed queries."""
        from diffusers_linattn.kernels.gated_states import scan_kernel, states_kernel

        call, gradient = self.call, weight is not None
        shape = (*decayed.shape[:2], call.chunks + 2, decayed.shape[4])
        states = decayed.new_empty(*shape, value.shape[3])
        counts = decayed.new_empty(shape if call.counted else (0,), dtype=torch.float32)
        dims = decayed.shape[4], value.shape[3]
        blocks = state_blocks(call.dtype, dims[1])
        self._launch(
            states_kernel,
            -(-dims[0] // blocks[0]) * -(-dims[1] // blocks[1]),
            [decayed, inside.decays, value, counts if weight is None else weight, states, counts],
            [value],
            [*dims, *blocks, CHUNK // 2, call.scalar, call.both, gradient, call.counted, call.precision],
        )
        rows, columns = SCAN
        grid = (-(-dims[0] // rows) * -(-dims[1] // columns), self.number, 1 + call.both)
        left = int(gradient and not call.both)
        initial = None
        if call.initial is not None and not gradient:
            initial = call.initial[:, self.first : self.first + self.number].contiguous()
        settings = [call.chunks, left, *dims, rows, columns, call.scalar, call.counted, initial is not None]
        tensors = (states, counts, inside.decays, inside.decays if initial is None else initial)
        self._run(scan_kernel, grid, *tensors, *settings, call.precision)
        return states, counts

    def initial_gradient(self, grad_states: _States, dinitial: torch.Tensor) -> None:
        """What of the gradients leaves the path where the states begin, written to these heads of `dinitial`."""
        call, (states, counts) = self.call, grad_states
        for direction, place in enumerate((1, call.chunks)[: 1 + call.both]):
            opposite = 1 - direction if call.both else 0
            target = dinitial[direction, self.first : self.first + self.number]
            target[..., : call.value.shape[3]] = states[opposite, :, place]
            if call.counted:
                target[..., -1] = counts[opposite, :, place]

    def output(
        self,
        decayed: torch.Tensor,
        inside: _Inside,
        value: torch.Tensor,
        states: _States,
        out: torch.Tensor,
        totals: torch.Tensor | None = None,
    ) -> None:
        """What queries read, and the sums of their weights; without these, the value's gradient, from keys."""
        from diffusers_linattn.kernels.gated_states import output_kernel

        call, gradient = self.call, totals is None
        dims = decayed.shape[4], value.shape[3]
        blocks = output_blocks(call.dtype, call.precision)
        self._launch(
            output_kernel,
            -(-dims[1] // blocks[1]),
            [inside.weights, decayed, inside.decays, value, *states, out, out if totals is None else totals],
            [value, out],
            [*dims, *blocks, CHUNK, call.scalar, call.both, gradient, call.counted and not gradient],
            [call.precision],
        )

    def gradients(
        self,
        grad: torch.Tensor,
        grad_counts: torch.Tensor,
        inside: _Inside,
        states: _States,
        grad_states: _States,
        dquery: torch.Tensor,
        dkey: torch.Tensor,
        dgate: torch.Tensor,
    ) -> None:
        from diffusers_linattn.kernels.gated_gradients import gradients_kernel, weight_gradients_kernel

        call = self.call
        grad_weights = states[0].new_empty(self.number, call.chunks, CHUNK, CHUNK)
        value_dim = call.value.shape[3]
        self._launch(
            weight_gradients_kernel,
            1,
            [grad, call.value, grad_counts, grad_weights],
            [grad, call.value],
            [value_dim, 32, CHUNK, call.counted, call.precision],
        )
        inputs, results = [call.query, call.key, call.gate, call.value, grad], [dquery, dkey, dgate]
        self._launch(
            gradients_kernel,
            call.key_blocks,
            [*inputs, grad_counts, grad_weights, *inside[1:], *states, *grad_states, *results],
            [*inputs, *results],
            [call.query.shape[3], value_dim, BLOCK, 32, CHUNK // 2, _levels(), call.scalar, call.both, call.counted],
            [call.query_features, call.key_features, call.precision],
        )

    def _launch(
        self, kernel: Any, blocks: int, tensors: list[torch.Tensor], strided: list[torch.Tensor], *constants: list[Any]
    ) -> None:
        strides = [stride for x in strided for stride in strides_of(x)]
        settings = [self.call.query.shape[1], self.first, *self.call.path]
        flat = [x for group in constants for x in group]
        self._run(kernel, (self.call.chunks, blocks, self.number), *tensors, *strides, *settings, *flat)

    def _run(self, kernel: Any, grid: tuple[int, int, int], *arguments: Any) -> None:
        run_kernel(kernel, grid, self.call.query.device, *arguments, num_warps=self.call.warps, num_stages=1)


def _levels() -> int:
    """How often half a chunk is cut into halves."""
    return (CHUNK // 2).bit_length() - 1
