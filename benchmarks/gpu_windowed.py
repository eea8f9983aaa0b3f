"""Windowed attention at FLUX's shapes (24 heads x 128, bf16, 512 text tokens) on a GPU: our kernel against others.

    python benchmarks/gpu_windowed.py                                        # writes results/windowed-<device>.json
    TRITON_INTERPRET=1 python benchmarks/gpu_windowed.py --smoke             # runs every line on a CPU, tiny

Compared are scaled_dot_product_attention over all tokens (cuDNN, flash), compiled FlexAttention over tokens in
raster order, as CLEAR runs it, and in tile order (the permutation not counted), and NATTEN (a square window, no text)
if it is installed. Every line is a ratio within one run, attention over all tokens measured once per side; our output
and gradients are checked before each.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch

from diffusers_linattn import TokenLayout
from diffusers_linattn.ops.local_choice import window_wins

import windowed_methods
from gpu_operators import Method, Row, compare, make_inputs, make_parser, report, softmax_methods, why_wrong


def methods(arguments: argparse.Namespace, side: int, window: int, backward: bool) -> dict[str, Method]:
    """Those that depend on the window."""
    text, device = arguments.text, arguments.device
    layout = windowed_methods.make_layout(text, side)
    table: dict[str, Method] = {"ours": windowed_methods.ours(layout, window)}
    if side <= 64:
        table["sdpa under the mask"] = windowed_methods.dense_under_the_mask(layout, window)
    compiled = device == "cuda"

    def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, tiled: bool) -> torch.Tensor:
        return windowed_methods.flex(text, side, window, device, tiled=tiled, compiled=compiled)(q, k, v)

    if window in arguments.flex_windows and not (backward and not compiled):
        table["flex raster"] = functools.partial(flex, tiled=False)
        if side % 16 == 0:
            table["flex tiles"] = functools.partial(flex, tiled=True)
    if natten := windowed_methods.natten(text, side, window):
        table["natten (square, no text)"] = natten
    return table


def measure_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    device = arguments.device
    of_all_tokens: dict[tuple[int, str], dict[str, float | str]] = {}  # the same for every window
    for window in arguments.windows:
        for side in arguments.sides:
            layout = windowed_methods.make_layout(arguments.text, side)
            inputs = make_inputs(layout.length, arguments.heads, arguments.head_dim, arguments.dtype, device)
            if wrong := why_wrong(windowed_methods.check, arguments.text, side, window, *inputs):
                yield {"side": side, "window": window} | wrong
                continue
            for name in arguments.passes:
                backward, known = name == "backward", of_all_tokens.get((side, name))
                table = methods(arguments, side, window, backward)
                # Seconds per pass at the largest size; and nothing to compile where only that is wanted.
                without = (side > 256 and backward) or not (arguments.seconds or arguments.smoke)
                dense = {} if without else softmax_methods(device == "cuda")
                table |= {} if known else dense
                row = {"side": side, "window": window}
                row |= compare(table, inputs, name, device, arguments.seconds, known)
                of_all_tokens[side, name] = {method: row["ms"][method] for method in dense}
                # Where "sdpa under the mask" was measured, the ratio to it says whether that was the right choice.
                row["chosen_by_default"] = "triton" if window_wins(layout, window) else "dense"
                yield row | rates(arguments, layout, side, window, backward, row["ms"])


def rates(
    arguments: argparse.Namespace,
    layout: TokenLayout,
    side: int,
    window: int,
    backward: bool,
    times: dict[str, float | str],
) -> dict[str, float]:
    """TFLOP/s of the pairs that count and of those computed, and the latter's share of dense attention's rate."""
    mine = times["ours"]
    if not isinstance(mine, float):
        return {}
    chip = 0
    if arguments.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        chip = 10 * major + minor
    dtype = getattr(torch, arguments.dtype)
    visited = windowed_methods.visited_pairs(layout, window, arguments.head_dim, dtype, chip)
    one = 2 * arguments.heads * arguments.head_dim  # operations of one product per pair
    useful = (5 if backward else 2) * windowed_methods.exact_pairs(arguments.text, side, window)
    # Two products forward; the query's gradient takes three, the key's and value's together four.
    executed = 3 * visited["query gradient"] + 4 * visited["key gradients"] if backward else 2 * visited["forward"]
    found = {
        "useful_tflops": round(one * useful / mine / 1e9, 2),
        "executed_tflops": round(one * executed / mine / 1e9, 2),
    }
    dense = [times.get(name) for name in ("sdpa", "sdpa cudnn", "sdpa flash")]
    fastest = min((value for value in dense if isinstance(value, float)), default=None)
    if fastest:
        rate = one * (5 if backward else 2) * layout.length**2 / fastest / 1e9
        found["dense_tflops"] = round(rate, 2)
        found["share_of_dense_rate"] = round(found["executed_tflops"] / rate, 3)
    return found


def main() -> None:
    parser = make_parser(__doc__)
    # What says most comes first, in case time runs out.
    parser.set_defaults(sides=[256, 512, 128, 64])
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 8, 32])
    parser.add_argument(
        "--flex-windows", type=int, nargs="*", default=[16], help="those FlexAttention is compiled for"
    )
    arguments = parser.parse_args()
    vars(arguments).update(device="cuda", text=512, heads=24, head_dim=128, dtype="bfloat16")
    if arguments.smoke:
        vars(arguments).update(device="cpu", text=5, heads=1, head_dim=16, dtype="float32", seconds=0.0)
        vars(arguments).update(sides=[16], windows=[4], flex_windows=[4])
    setting = {key: vars(arguments)[key] for key in ("text", "heads", "head_dim", "dtype")}
    report("windowed", arguments, setting, measure_rows(arguments))


if __name__ == "__main__":
    main()
