"""What a converted layer costs beyond the stock one when the work is the same, and how long conversion takes.

    python benchmarks/wrapper_overhead.py            # a minute
    python benchmarks/wrapper_overhead.py --quick    # few rounds, nothing written

Tiny layers, eager, one thread, so that only what Python does is left. Each attention layer is called as its model
calls it: as it is in diffusers; converted with everything but the operator ("wrapper": the same
`scaled_dot_product_attention` answers); and converted with a window that covers the grid ("window": the operator
checks its arguments as well, and then calls the same). Outputs are compared before anything is timed. Microseconds are
medians over interleaved rounds; they depend on the machine, so the ratio stands beside them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_linattn import ClearProcessor, linearize
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.processors import AttentionCall


RESULTS = Path(__file__).parent / "results" / "wrapper_overhead-cpu.json"
WINDOW = 100


def flux(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 6, 6),
    }
    return diffusers.FluxTransformer2DModel(**{**config, **changes}).eval()


def call_flux(model: nn.Module) -> None:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    model(
        hidden_states=torch.randn(1, 16, 16),
        encoder_hidden_states=torch.randn(1, 4, 24),
        pooled_projections=torch.randn(1, 20),
        timestep=torch.rand(1),
        img_ids=ids,
        txt_ids=torch.zeros(4, 3),
    )


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        use_additional_conditions=False,
    ).eval()


def call_pixart(model: nn.Module) -> None:
    model(
        hidden_states=torch.randn(1, 4, 8, 8),
        encoder_hidden_states=torch.randn(1, 4, 24),
        timestep=torch.tensor([3]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).eval()


def call_sd3(model: nn.Module) -> None:
    model(
        hidden_states=torch.randn(1, 4, 8, 8),
        encoder_hidden_states=torch.randn(1, 4, 24),
        pooled_projections=torch.randn(1, 20),
        timestep=torch.rand(1),
    )


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], None], str]] = {
    "FLUX, double": (flux, call_flux, "transformer_blocks.0.attn"),
    "FLUX, single": (flux, call_flux, "single_transformer_blocks.0.attn"),
    "SD3": (sd3, call_sd3, "transformer_blocks.0.attn"),
    "PixArt": (pixart, call_pixart, "transformer_blocks.0.attn1"),
}


def same_attention(call: AttentionCall) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=call.mask, scale=call.scale, enable_gqa=call.enable_gqa
    )


def prepare(name: str, variant: str) -> Callable[[], Any]:
    """One call of that layer, with the arguments that its model gives it."""
    make, call, path = LAYERS[name]
    torch.manual_seed(0)
    model = make()
    if variant != "stock":
        linearize(model, ClearProcessor(window=WINDOW))
        if variant == "wrapper":
            for layer in layers_of(model):
                layer.processor.attend = same_attention  # type: ignore[union-attr, method-assign]
    layer: Any = model.get_submodule(path)
    given: dict[str, Any] = {}
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    call(model)
    handle.remove()
    return lambda: layer(*given["args"], **given["kwargs"])


def check(calls: dict[str, Callable[[], Any]]) -> None:
    outputs = {name: call() for name, call in calls.items()}
    for output in outputs.values():
        torch.testing.assert_close(output, outputs["stock"], atol=1e-6, rtol=0)


def measure(calls: dict[str, Callable[[], Any]], rounds: int, repeats: int = 20) -> dict[str, list[float]]:
    """Microseconds of CPU time for each call, round by round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(repeats):
                call()
            times[name].append((time.thread_time() - start) / repeats * 1e6)
    return times


def measure_conversion(rounds: int) -> float:
    """Seconds to convert a model with as many layers as FLUX.1, without memory behind its weights."""
    times = []
    for _ in range(rounds):
        with torch.device("meta"):
            model = flux(num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24)
        start = time.thread_time()
        linearize(model, ClearProcessor(window=16, down_factor=4))
        times.append(time.thread_time() - start)
    return statistics.median(times)


def environment() -> dict[str, object]:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 10 if args.quick else args.rounds
    report: dict[str, Any] = {"environment": environment(), "microseconds": {}}
    for name in LAYERS:
        calls = {variant: prepare(name, variant) for variant in ("stock", "wrapper", "window")}
        check(calls)
        found = measure(calls, rounds)
        stock = found["stock"]
        row = {"stock": round(statistics.median(stock), 1)}
        for variant in ("wrapper", "window"):
            # Against the stock call of the same round: the rounds of a busy machine differ.
            added = statistics.median(ours - theirs for ours, theirs in zip(found[variant], stock, strict=True))
            row |= {f"{variant}_adds": round(added, 1), f"{variant}_ratio": round(1 + added / row["stock"], 2)}
        report["microseconds"][name] = row
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    report["conversion_seconds"] = round(measure_conversion(1 if args.quick else 5), 3)
    print(f"conversion of 57 layers on the meta device: {report['conversion_seconds']} s")
    if not args.quick:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
