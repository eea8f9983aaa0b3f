"""Linear attention on a GPU at the shapes of FLUX and of LiT: our kernels against others and the memory's speed.

    python benchmarks/gpu_linear.py                                   # writes results/linear-<device>.json
    TRITON_INTERPRET=1 python benchmarks/gpu_linear.py --smoke        # runs every line on a CPU, tiny

Compared are scaled_dot_product_attention (cuDNN, flash), our PyTorch implementation, the two products as plain einsum,
and with `--fla` fla-core's linear attention, which is causal: it does half of the work in one direction. Beside them
stands the time that reading and writing every tensor once takes at the speed of a copy in the same run. Every line is
a ratio within one run; our output and gradients are checked before each.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from diffusers_linattn import TokenLayout, linear_attention

from gpu_operators import (
    Method,
    Row,
    add_most_softmax_tokens,
    check,
    compare,
    make_inputs,
    make_parser,
    report,
    share_of_bandwidth,
    softmax_methods,
    why_wrong,
)
from gpu_timing import copy_bandwidth


# Heads, head_dim and text tokens.
CASES = {"flux, image alone": (24, 128, 0), "flux": (24, 128, 512), "lit": (2, 576, 0)}
# No fast kernel of softmax attention takes wider heads; the slow one takes seconds for more tokens.
MOST_FAST_DIM, MOST_WIDE_TOKENS = 256, 128**2


def einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As one would write it, in the dtype of the inputs, without text."""
    phi_q, phi_k = F.relu(q) + 1e-6, F.relu(k) + 1e-6
    state = torch.einsum("bhnk,bhnv->bhkv", phi_k, v)
    divisor = torch.einsum("bhnk,bhk->bhn", phi_q, phi_k.sum(2))
    return torch.einsum("bhnk,bhkv->bhnv", phi_q, state) / (divisor[..., None] + 1e-6)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from fla.ops.linear_attn import chunk_linear_attn

    q, k, v = (x.transpose(1, 2) for x in (F.relu(q), F.relu(k), v))
    return chunk_linear_attn(q, k, v, scale=1.0)[0].transpose(1, 2)


def methods(layout: TokenLayout, head_dim: int, device: str, most_softmax_tokens: int, fla: bool) -> dict[str, Method]:
    fast = head_dim <= MOST_FAST_DIM
    table: dict[str, Method] = {
        "ours": functools.partial(linear_attention, layout=layout, impl="triton"),
        "ours in pytorch": functools.partial(linear_attention, layout=layout, impl="torch"),
    }
    if not layout.num_text:
        table["einsum"] = einsum
        if fla and fast:
            table["fla, causal"] = causal
    if layout.length - layout.num_text <= (most_softmax_tokens if fast else MOST_WIDE_TOKENS):
        table |= softmax_methods(device == "cuda" and fast)
    return table


def measure_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    for case in arguments.cases:
        heads, head_dim, text = CASES[case]
        layout = TokenLayout.joint(text=text, grid=(1, 17, 21))
        inputs = make_inputs(layout.length, min(heads, 2), head_dim, arguments.dtype, arguments.device)
        if wrong := why_wrong(check, functools.partial(linear_attention, layout=layout), inputs):
            yield {"case": case} | wrong
            continue
        for side in arguments.sides:
            layout = TokenLayout.joint(text=text, grid=(1, side, side))
            inputs = make_inputs(layout.length, heads, head_dim, arguments.dtype, arguments.device)
            # Query, key, value and output; backward also their four gradients.
            tensor = inputs[0].numel() * inputs[0].element_size()
            table = methods(layout, head_dim, arguments.device, arguments.most_softmax_tokens, arguments.fla)
            for name in arguments.passes:
                row = {"case": case, "side": side}
                row |= compare(table, inputs, name, arguments.device, arguments.seconds)
                yield share_of_bandwidth(row, (8 if name == "backward" else 4) * tensor, arguments.bandwidth)


def main() -> None:
    parser = make_parser(__doc__)
    add_most_softmax_tokens(parser)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--fla", action="store_true", help="where fla-core is installed")
    arguments = parser.parse_args()
    vars(arguments).update(device="cuda", dtype="bfloat16", bandwidth=None)
    if arguments.smoke:
        CASES.update({"flux, image alone": (1, 16, 0), "flux": (1, 16, 5), "lit": (1, 144, 0)})
        vars(arguments).update(device="cpu", dtype="float32", seconds=0.0, sides=[6])
    else:
        arguments.bandwidth = copy_bandwidth()
    setting = {"dtype": arguments.dtype, "cases": CASES, "copy_tb_per_s": arguments.bandwidth}
    report("linear-fla" if arguments.fla else "linear", arguments, setting, measure_rows(arguments))


if __name__ == "__main__":
    main()
