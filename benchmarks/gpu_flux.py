"""One denoising step of FLUX.1's transformer at its real size with random bf16 weights: dense, CLEAR's way, ours.

    python benchmarks/gpu_flux.py                                            # writes results/flux-<device>.json
    python benchmarks/gpu_flux.py --sides 512                                # 8K: a minute and more per dense step
    TRITON_INTERPRET=1 python benchmarks/gpu_flux.py --smoke                 # runs every line on a CPU, tiny

"flex" answers the attention call with compiled FlexAttention in raster order, as CLEAR's processors do; "dense" is the
stock model, whose kernel torch chooses. All sizes are run as they are, then all with the repeated blocks compiled; one
method after the other, not in turns. Ratios are within one run, and a row says from how many steps each time is. Ours
is timed only where its first attention layer gives what FlexAttention's gave, or, where that failed, the operator what
fp32 arithmetic gives.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from diffusers_linattn import ClearProcessor, linearize, restore, status

import windowed_methods as methods
from gpu_operators import Method
from gpu_operators import make_inputs as make_operands
from gpu_timing import environment, in_short, write


SIZES = {64: "1K", 128: "2K", 256: "4K", 512: "8K"}
SMOKE: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "in_channels": 8,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}


# Relative. What the first attention layer gives differs by 0.006 between two ways to round in bf16 and by 0.3 between
# windows of 4 and 5; what the blocks give, whose random weights let little attention through, by 0.002 and 0.006.
MOST_DIFFERENCE = 0.02


class FlexProcessor(ClearProcessor):
    """CLEAR's window through FlexAttention in raster order."""

    flex: Method  # of the class, and set before blocks are compiled, which would trace how its mask is made

    def attend(self, call: Any) -> torch.Tensor:
        return self.flex(call.query, call.key, call.value)


def make_model(device: str, smoke: bool, layers: int) -> FluxTransformer2DModel:
    if smoke:
        return FluxTransformer2DModel(**SMOKE).eval()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return FluxTransformer2DModel(guidance_embeds=True, num_layers=layers, num_single_layers=2 * layers).eval()
    finally:
        torch.set_default_dtype(default)


def make_inputs(model: FluxTransformer2DModel, side: int, text: int, device: str) -> dict[str, torch.Tensor]:
    config, dtype = model.config, model.dtype
    ids = torch.zeros(side, side, 3)
    ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)
    inputs = {
        "hidden_states": torch.randn(1, side * side, config.in_channels),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.tensor([3.5])
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    return inputs | {"img_ids": ids.reshape(-1, 3).to(device), "txt_ids": torch.zeros(text, 3, device=device)}


@contextlib.contextmanager
def few_blocks(model: FluxTransformer2DModel) -> Iterator[None]:
    """Two of each kind: a step then compiles all that the whole model needs, in a fraction of its time.

    One would not do: a block is compiled anew for what another of its kind returns, which has other strides.
    """
    whole = model.transformer_blocks, model.single_transformer_blocks
    model.transformer_blocks, model.single_transformer_blocks = (blocks[:2] for blocks in whole)
    try:
        yield
    finally:
        model.transformer_blocks, model.single_transformer_blocks = whole


def probe(model: FluxTransformer2DModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first attention layer gives for the picture and what a few blocks give, (batch, tokens, channels)."""
    outputs: list[torch.Tensor] = []
    attention = model.transformer_blocks[0].attn
    hook = attention.register_forward_hook(lambda module, arguments, output: outputs.append(output[0]))
    try:
        with few_blocks(model):
            outputs.append(step(model, inputs))
    finally:
        hook.remove()
    return outputs[0], outputs[1]


def seconds(run: Callable[[], object], device: str) -> list[float]:
    """Three times; where one takes over a second two, over ten seconds one."""
    times: list[float] = []
    while len(times) < 3 and max(times, default=0.0) < (1 if len(times) > 1 else 10):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def convert(model: FluxTransformer2DModel, method: str, window: int, side: int, text: int, smoke: bool) -> None:
    restore(model)
    if method == "ours":
        linearize(model, ClearProcessor(window=window, impl="triton" if smoke else None))
    elif method == "flex":
        device = str(model.device)
        FlexProcessor.flex = staticmethod(methods.flex(text, side, window, device, tiled=False, compiled=not smoke))
        linearize(model, FlexProcessor(window=window))


def step(model: FluxTransformer2DModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256, 64], help="sides of the grid in tokens")
    parser.add_argument("--window", type=int, default=16)
    # What takes longest comes last, in case time runs out; before ours what it is compared with.
    parser.add_argument("--methods", nargs="+", default=["flex", "ours", "dense"])
    parser.add_argument("--layers", type=int, default=19, help="double blocks; of single ones there are twice as many")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    device, text = ("cpu", 5) if smoke else ("cuda", 512)
    sides, window = ([16], 4) if smoke else (arguments.sides, arguments.window)
    model = make_model(device, smoke, arguments.layers)
    rows: list[dict[str, Any]] = []
    setting = {"window": window, "text": text, "layers": arguments.layers}
    report = {"environment": environment(device), **setting, "rows": rows}
    failed = False
    for compiled, side in itertools.product((False, True), sides):
        inputs = make_inputs(model, side, text, device)
        row: dict[str, Any] = {"side": side, "size": SIZES.get(side), "compiled_blocks": compiled}
        rows.append(row)
        attention: dict[str, torch.Tensor] = {}
        for method in arguments.methods:
            if compiled and method == "dense" and side >= 512:
                continue  # a minute and a half, and the blocks' other work is a few percent of it
            torch._dynamo.reset()
            try:
                convert(model, method, window, side, text, smoke)
                attention[method], output = probe(model, inputs)
                if method != "dense":
                    compare_attention(row, attention)
                if method == "ours" and "flex" not in attention:
                    heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
                    dtype = str(model.dtype).removeprefix("torch.")
                    operands = make_operands(text + side * side, heads, head_dim, dtype, device)
                    methods.check(text, side, window, *operands)
                    row["ours_checked_against"] = "fp32 arithmetic on random numbers"
                if compiled:
                    model.compile_repeated_blocks(fullgraph=method != "flex", backend="eager" if smoke else "inductor")
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with few_blocks(model):
                    difference = relative_difference(step(model, inputs), output)
                if not difference <= MOST_DIFFERENCE:
                    raise ValueError(f"compiled blocks differ from those that are not by {difference}")
                times = seconds(functools.partial(step, model, inputs), device)
                row[method], row[f"{method}_steps"] = round(min(times), 4), len(times)
                if device == "cuda":
                    row[f"{method}_peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                if method == "ours":
                    row["implementation"] = status(model).converted[0].implementation
            except Exception as error:  # one method that fails must not hide the others
                row[method] = in_short(error)
                failed |= method == "ours"
            finally:
                for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                    block._compiled_call_impl = None
            add_ratios(row)
            print(json.dumps(row), flush=True)
            if not smoke:  # after every method: what was measured stays if time runs out
                write("flux" if max(sides) < 512 else "flux-8k", arguments.output, report)
    if failed:
        raise SystemExit("flux: ours failed")


def compare_attention(row: dict[str, Any], attention: dict[str, torch.Tensor]) -> None:
    """Note by how much ours differs from FlexAttention, once both are there; a ValueError where it is too much."""
    if attention.keys() >= {"ours", "flex"}:
        row["ours_differs_from_flex_by"] = difference = relative_difference(attention["ours"], attention["flex"])
        if not difference <= MOST_DIFFERENCE:
            raise ValueError(f"the first attention layer differs from FlexAttention's by {difference}")


def relative_difference(x: torch.Tensor, expected: torch.Tensor) -> float:
    return round(float((x.float() - expected.float()).norm() / expected.float().norm()), 6)


def add_ratios(row: dict[str, Any]) -> None:
    """Add what follows from the methods measured so far."""
    ours = row.get("ours")
    if isinstance(ours, float):
        others = [m for m in ("dense", "flex") if isinstance(row.get(m), float)]
        row["times_faster"] = {method: round(row[method] / max(ours, 1e-9), 3) for method in others}


if __name__ == "__main__":
    main()
