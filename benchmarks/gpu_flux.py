"""One denoising step of FLUX.1's transformer at its real size with random bf16 weights: dense, CLEAR's way, ours.

    python benchmarks/gpu_flux.py                                            # writes results/flux-<device>.json
    python benchmarks/gpu_flux.py --sides 512                                # 8K: minutes, most of it the dense step
    TRITON_INTERPRET=1 python benchmarks/gpu_flux.py --smoke                 # runs every line on a CPU, tiny

"flex" answers the attention call with compiled FlexAttention in raster order, as CLEAR's processors do. Each is run as
it is and with the repeated blocks compiled. Ratios are within one run.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from diffusers_linattn import ClearProcessor, linearize, restore, status

import windowed_methods as methods
from gpu_operators import Method
from gpu_timing import environment, write


SIZES = {64: "1K", 128: "2K", 256: "4K", 512: "8K"}
SMOKE: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "in_channels": 8,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}


class FlexProcessor(ClearProcessor):
    """CLEAR's window through FlexAttention in raster order."""

    compiled = True

    def attend(self, call: Any) -> torch.Tensor:
        return _flex(call.layout, self.window, str(call.query.device), self.compiled)(call.query, call.key, call.value)


@functools.lru_cache(maxsize=2)
def _flex(layout: Any, window: int, device: str, compiled: bool) -> Method:
    _, height, width = layout.grids[0].grid
    assert height == width, "this benchmark uses squares"
    return methods.flex(layout.num_text, height, window, device, tiled=False, compiled=compiled)


def make_model(device: str, smoke: bool) -> FluxTransformer2DModel:
    if smoke:
        return FluxTransformer2DModel(**SMOKE).eval()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return FluxTransformer2DModel(guidance_embeds=True).eval()
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


def seconds(run: Callable[[], Any], device: str, repeats: int, warm_up: bool) -> float:
    times = []
    for i in range(repeats + warm_up):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    return min(times)


def convert(model: FluxTransformer2DModel, method: str, window: int, smoke: bool) -> None:
    restore(model)
    if method == "ours":
        linearize(model, ClearProcessor(window=window, impl="triton" if smoke else None))
    elif method == "flex":
        linearize(model, FlexProcessor(window=window))


def step(model: FluxTransformer2DModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256], help="sides of the grid in tokens")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["dense", "flex", "ours"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    device, text = ("cpu", 5) if arguments.smoke else ("cuda", 512)
    sides, window = ([16], 4) if arguments.smoke else (arguments.sides, arguments.window)
    FlexProcessor.compiled = not arguments.smoke
    model = make_model(device, arguments.smoke)
    rows: list[dict[str, Any]] = []
    report = {"environment": environment(device), "window": window, "text": text, "rows": rows}
    for compiled in (False, True):
        for side in sides:
            inputs = make_inputs(model, side, text, device)
            row: dict[str, Any] = {"side": side, "size": SIZES.get(side), "compiled_blocks": compiled}
            outputs: dict[str, torch.Tensor] = {}
            for method in arguments.methods:
                if compiled and method == "dense" and side >= 512:
                    continue  # a minute and a half, and the blocks' other work is a few percent of it
                torch._dynamo.reset()
                convert(model, method, window, arguments.smoke)
                try:
                    if compiled:
                        backend = "eager" if arguments.smoke else "inductor"
                        model.compile_repeated_blocks(fullgraph=method != "flex", backend=backend)
                    if device == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    long = method == "dense" and side >= 512
                    run = functools.partial(step, model, inputs)
                    row[method] = round(seconds(run, device, 1 if long else 3, warm_up=not long), 4)
                    if device == "cuda":
                        row[f"{method}_peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                    if method != "dense":
                        outputs[method] = run()
                        if method == "ours":
                            row["implementation"] = status(model).converted[0].implementation
                except Exception as error:  # one method that fails must not hide the others
                    row[method] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                finally:
                    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                        block._compiled_call_impl = None
            if len(outputs) == 2:
                difference = (outputs["ours"] - outputs["flex"]).norm() / outputs["flex"].norm()
                row["ours_differs_from_flex_by"] = float(difference)
            ours = row.get("ours")
            if isinstance(ours, float):
                others = [m for m in ("dense", "flex") if isinstance(row.get(m), float)]
                row["times_faster"] = {method: round(row[method] / max(ours, 1e-9), 3) for method in others}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if not arguments.smoke:
                write("flux" if max(sides) < 512 else "flux-8k", arguments.output, report)


if __name__ == "__main__":
    main()
