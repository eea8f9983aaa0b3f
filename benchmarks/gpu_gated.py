"""Times gated linear attention on a GPU against SDPA (cuDNN, flash) and fla-core, at FLUX's and DiT-S's shapes.

    python benchmarks/gpu_gated.py --output results/     # every size; --smoke on a CPU, in Triton's interpreter

Ours both ways, one way and with one gate per head; the PyTorch implementation at small sizes, and the time that
reading and writing every tensor once takes at the memory's speed. With `--fla` also fla-core's kernel, as `impl="fla"`
or as two bare calls (both forward, no features, no denominator: less work than ours); for minutes it compiles some 300
configurations for each way and each head_dim, to choose from.
Every line is a ratio within one run; output and gradients are checked before each shape.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from diffusers_linattn import TokenLayout, gated_linear_attention
from diffusers_linattn.ops.gated_fla import load_chunk_gla

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


SHAPES = {"flux": (24, 128), "dit-s": (6, 64)}
# How ours scan. All but one have a gate per channel.
PER_HEAD = "ours, a gate per head"
OURS: dict[str, dict[str, str]] = {
    "ours": {},
    "ours, by columns": {"order": "columns"},
    "ours, one way": {"direction": "forward"},
    PER_HEAD: {},
}
MOST_TORCH_TOKENS = 128**2


def with_gates(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Query, key, value, a gate per channel and one per head."""
    query, _, _ = inputs
    shapes = (query.shape, (*query.shape[:3], 1))
    return inputs + [F.logsigmoid(torch.randn(shape, device=query.device)) / 16 for shape in shapes]


def own_inputs(name: str, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those with the gate that this method takes."""
    *others, gate, per_head = inputs
    return [*others, per_head if name == PER_HEAD else gate]


def methods(layout: TokenLayout, on_gpu: bool, most_softmax_tokens: int, fla: list[str]) -> dict[str, Method]:
    def gated(*inputs: torch.Tensor, name: str, impl: str) -> torch.Tensor:
        return gated_linear_attention(*own_inputs(name, inputs), layout=layout, impl=impl, **OURS[name])

    table: dict[str, Method] = {name: functools.partial(gated, name=name, impl="triton") for name in OURS}
    if layout.length <= most_softmax_tokens:
        table |= {name: _without_gates(attend) for name, attend in softmax_methods(on_gpu).items()}
    if layout.length <= MOST_TORCH_TOKENS:
        table["ours in pytorch"] = functools.partial(gated, name="ours", impl="chunked")
    if "impl" in fla:
        table["fla"] = functools.partial(gated, name="ours", impl="fla")
    if "bare" in fla:
        table["fla, two bare calls"] = lambda q, k, v, g, _: two_bare_calls(q, k, v, g)
    return table


def two_bare_calls(*inputs: torch.Tensor) -> torch.Tensor:
    scan = functools.partial(load_chunk_gla(), *(x.transpose(1, 2) for x in inputs), scale=1.0)
    return (scan()[0] + scan()[0]).transpose(1, 2)


def _without_gates(attend: Method) -> Method:
    return lambda q, k, v, *_: attend(q, k, v)


def check_ours(shape: str, dtype: str, device: str) -> None:
    """All of ours against the reference, over several chunks."""
    layout = TokenLayout.image((1, 13, 17))
    inputs = with_gates(make_inputs(layout.length, *SHAPES[shape], dtype, device))
    for name, options in OURS.items():
        check(functools.partial(gated_linear_attention, layout=layout, **options), own_inputs(name, inputs))


def measure_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    for shape in arguments.shapes:
        if wrong := why_wrong(check_ours, shape, arguments.dtype, arguments.device):
            yield {"shape": shape} | wrong
            continue
        for side in arguments.sides:
            layout = TokenLayout.image((1, side, side))
            inputs = with_gates(make_inputs(layout.length, *SHAPES[shape], arguments.dtype, arguments.device))
            table = methods(layout, arguments.device == "cuda", arguments.most_softmax_tokens, arguments.fla)
            for name in arguments.passes:
                row = {"shape": shape, "side": side}
                row |= compare(table, inputs, name, arguments.device, arguments.seconds)
                yield share_of_bandwidth(row, moved_bytes(inputs, name), arguments.bandwidth)


def moved_bytes(inputs: list[torch.Tensor], name: str) -> int:
    """Query, key, value, the gate and the output once; backward the inputs, a gradient and four gradients."""
    query, key, value, gate, _ = (x.numel() * x.element_size() for x in inputs)
    read = query + key + value + gate
    return 2 * read + value if name == "backward" else read + value


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--fla", nargs="+", default=[], choices=["impl", "bare"], help="where fla-core is installed")
    add_most_softmax_tokens(parser)
    arguments = parser.parse_args()
    vars(arguments).update(device="cuda", dtype="bfloat16", bandwidth=None)
    if arguments.smoke:
        SHAPES["flux"] = (1, 16)
        vars(arguments).update(device="cpu", dtype="float32", seconds=0.0, sides=[6], shapes=["flux"])
    else:
        arguments.bandwidth = copy_bandwidth()
    setting = {"dtype": arguments.dtype, "shapes": SHAPES, "copy_tb_per_s": arguments.bandwidth}
    # A run with fla-core takes the place of no other.
    name = "-".join(["gated", *(["fla", *arguments.fla, *arguments.shapes] if arguments.fla else [])])
    report(name, arguments, setting, measure_rows(arguments))


if __name__ == "__main__":
    main()
