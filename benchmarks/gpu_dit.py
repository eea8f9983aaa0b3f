"""The headline cases of LiT and DiG: DiT at its real size with random weights, one training and one inference step.

    python benchmarks/gpu_dit.py                                        # writes results/dit-<device>.json
    python benchmarks/gpu_dit.py --device cpu --sides 32 64 --layers 4  # ratios alone, in minutes
    python benchmarks/gpu_dit.py --smoke                                # runs every line on a CPU, tiny

In one run: softmax of the whole matrix between two products ("unfused", what both papers compare with), softmax by
scaled_dot_product_attention, and ours, in LiT's form (2 heads for DiT-S) and DiG's ("gated, one way" is the paper's,
"gated" scans both ways). Training is forward, backward and AdamW on fp32 weights under bf16 autocast, one picture;
inference a forward pass with bf16 weights and two, as guidance has; on a CPU all is fp32. Ours is compared with the
reference, output and gradients, before anything is timed. Then one layer by the number of its heads: LiT's other
claim, that few large heads cost arithmetic but no time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor

from diffusers_linattn import GLAProcessor, LinearProcessor, linearize, status
from diffusers_linattn.linearize import layers_of

from gpu_timing import environment, measure, write
from linear_attention import cpu_name, interleaved, kept_bytes


# Heads, head_dim, layers; of LiT's forms the heads.
MODELS = {"S": (6, 64, 12), "B": (12, 64, 12), "XL": (16, 72, 28)}
LIT_HEADS = {"S": 2, "B": 3, "XL": 4}
HEADS = (2, 3, 6, 12, 24, 48, 96)
PATCH = 16  # pixels of a token's side: the autoencoder's 8 times DiT's patch of 2
BATCH = {"training": 1, "inference": 2}
UNFUSED, SDPA, LINEAR, GATED, ONE_WAY = "unfused", "sdpa", "linear", "gated", "gated, one way"
BASELINES = (UNFUSED, SDPA)


@dataclass(frozen=True)
class Case:
    """A model at a size, the sides of its token grid being `side`."""

    model: str
    side: int
    methods: tuple[str, ...]
    passes: tuple[str, ...]
    layers: int | None = None  # None: all it has

    @property
    def num_layers(self) -> int:
        return self.layers or MODELS[self.model][2]

    @property
    def name(self) -> dict[str, Any]:
        pixels = PATCH * self.side
        return {"model": f"DiT-{self.model}/2", "pixels": pixels, "tokens": self.side**2, "layers": self.num_layers}


BOTH = ("training", "inference")
CASES = (
    Case("S", 1792 // PATCH, (UNFUSED, SDPA, GATED, ONE_WAY), BOTH),
    Case("XL", 2048 // PATCH, (UNFUSED, SDPA, GATED, ONE_WAY), ("inference",)),
    Case("S", 2048 // PATCH, (UNFUSED, SDPA, LINEAR), BOTH),
)


def make_model(case: Case, method: str, device: str, dtype: torch.dtype, impl: str | None = None) -> Any:
    heads, head_dim, _ = MODELS[case.model]
    torch.manual_seed(0)
    with torch.device(device):
        model = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=case.num_layers,
            out_channels=8,
            sample_size=2 * case.side,
        )
    model = torch.nn.Module.to(model.eval(), dtype)  # that of diffusers warns of modules to keep in fp32, of none
    if method == UNFUSED:
        for block in model.transformer_blocks:
            block.attn1.set_processor(AttnProcessor())
    elif method != SDPA:
        processors = {
            LINEAR: LinearProcessor(heads=LIT_HEADS[case.model], impl=impl),
            GATED: GLAProcessor(impl=impl),
            ONE_WAY: GLAProcessor(direction="alternate", impl=impl),
        }
        linearize(model, processors[method])
        # Gates start at 1 and convolutions at 0: give them something to do.
        for layer in layers_of(model):
            for parameter in layer.processor.own_parameters().values():
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_inputs(case: Case, batch: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(batch, 4, 2 * case.side, 2 * case.side, generator=generator, device=device).to(dtype)
    numbers = torch.arange(1, batch + 1, device=device)
    return {"hidden_states": latents, "timestep": 100 * numbers, "class_labels": numbers}


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    device = inputs["hidden_states"].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return model(**inputs).sample.float().square().mean()


def train(model: Any, optimizer: torch.optim.Optimizer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = loss_of(model, inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.no_grad()
def infer(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).sample


def make_step(case: Case, method: str, name: str, device: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """A model and a step of it."""
    dtype = torch.bfloat16 if name == "inference" and device == "cuda" else torch.float32
    model = make_model(case, method, device, dtype)
    inputs = make_inputs(case, BATCH[name], device, dtype)
    if name == "inference":
        return model, functools.partial(infer, model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    return model, functools.partial(train, model, optimizer, inputs)


def check(cases: tuple[Case, ...], device: str) -> None:
    """Attention outputs and gradients against the reference on a small grid; a speed-up of a wrong result is none."""
    methods = dict.fromkeys((case.model, method) for case in cases for method in case.methods)
    limit = 0.05 if device == "cuda" else 1e-3
    for model, method in methods:
        if method in BASELINES:
            continue
        case = Case(model, 12, (method,), BOTH, layers=2)
        ours, expected = (_attention_and_gradients(case, method, device, impl) for impl in (None, "reference"))
        for what, found, reference in zip(("outputs", "gradients"), ours, expected, strict=True):
            error = ((found - reference).norm() / reference.norm()).item()
            if not error < limit:  # NaN included
                raise SystemExit(f"{method} on DiT-{model}: {what} are off by {error}: nothing was timed.")


def _attention_and_gradients(
    case: Case, method: str, device: str, impl: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    model, outputs = make_model(case, method, device, torch.float32, impl), []
    for layer in layers_of(model):
        layer.attn.register_forward_hook(lambda *arguments: outputs.append(arguments[2].detach().float().flatten()))
    loss_of(model, make_inputs(case, 2, device, torch.float32)).backward()
    parameters = itertools.chain.from_iterable(layer.attn.parameters() for layer in layers_of(model))
    return torch.cat(outputs), torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def compare(case: Case, name: str, device: str, seconds: float, rounds: int) -> dict[str, Any]:
    """One row: the memory of each method by itself, then all in turn."""
    row: dict[str, Any] = {**case.name, "pass": name, "batch": BATCH[name]}
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    memory: dict[str, float | str] = {}
    implementations: dict[str, str] = {}
    for method in case.methods:
        if device == "cuda":
            before = torch.cuda.memory_allocated()
        model, run = make_step(case, method, name, device)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(2 if device == "cuda" else 1):  # from the second step on there is the optimizer's state
                finite = bool(run().isfinite().all())
        except torch.OutOfMemoryError as error:
            memory[method] = f"out of memory: {str(error).splitlines()[0][:160]}"
            del model, run
            continue
        if not finite:
            raise SystemExit(f"{method} in {row} is not finite: nothing was timed.")
        if device == "cuda":
            memory[method] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
        elif name == "training":
            inputs = make_inputs(case, BATCH[name], device, torch.float32)
            kept = kept_bytes(functools.partial(loss_of, model, inputs), model.parameters())
            memory[method] = round(kept / 2**20, 1)
        if method not in BASELINES:
            implementations[method] = status(model).converted[0].implementation
        runs[method] = run
    times = measure(runs, device, seconds) if device == "cuda" else interleaved(runs, rounds, device)
    if device == "cuda":
        row["ms"] = times
    if memory:
        row["peak_gigabytes" if device == "cuda" else "kept_for_backward_megabytes"] = memory
    row["times_faster"] = ratios(times)
    row["implementation"] = implementations
    return row


def ratios(times: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times faster ours are than each baseline that ran."""
    measured = {method: value for method, value in times.items() if isinstance(value, float)}
    return {
        method: {other: round(measured[other] / value, 2) for other in BASELINES if other in measured}
        for method, value in measured.items()
        if method not in BASELINES
    }


def compare_heads(model: str, side: int, device: str, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """One attention layer, forward, by its number of heads: time and multiplications."""
    own_heads, head_dim, _ = MODELS[model]
    channels, tokens, batch = own_heads * head_dim, side**2, BATCH["inference"]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    case = Case(model, side, (SDPA,), ("inference",), layers=1)
    hidden = torch.randn(batch, tokens, channels, device=device).to(dtype)
    for heads in (None, *HEADS):
        built = make_model(case, SDPA, device, dtype)
        if heads is not None:
            linearize(built, LinearProcessor(heads=heads))
            infer(built, make_inputs(case, batch, device, dtype))  # says what the tokens are
        attention = built.transformer_blocks[0].attn1
        runs[SDPA if heads is None else str(heads)] = torch.no_grad()(functools.partial(attention, hidden))
    times = measure(runs, device, seconds) if device == "cuda" else interleaved(runs, rounds, device)
    rows = []
    for heads in HEADS:
        # Projections, the state and its product with the queries, the 5x5 convolution.
        operations = tokens * channels * (4 * channels + 2 * channels // heads + 25)
        row: dict[str, Any] = {"model": f"DiT-{model}/2", "tokens": tokens, "heads": heads}
        row |= {"head_dim": channels // heads, "giga_multiplications": round(operations / 1e9, 3)}
        mine, own, full = (times[name] for name in (str(heads), str(own_heads), SDPA))
        if isinstance(mine, float) and isinstance(own, float):
            row["time_relative_to_own_heads"] = round(mine / own, 3)
        if isinstance(mine, float) and isinstance(full, float):
            row["times_faster_than_sdpa"] = round(full / mine, 2)
        rows.append(row | ({"ms": mine} if device == "cuda" else {}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sides", type=int, nargs="+", help="DiT-S at these sides of the grid instead of the papers'")
    parser.add_argument("--layers", type=int, help="of DiT-S with --sides; default: all 12")
    parser.add_argument("--seconds", type=float, default=1.0, help="about how long a row takes on a GPU")
    parser.add_argument("--rounds", type=int, default=2, help="on a CPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    arguments = parser.parse_args()
    if arguments.smoke:
        vars(arguments).update(device="cpu", sides=[8], layers=1, rounds=1)
    device, limits = arguments.device, (arguments.device, arguments.seconds, arguments.rounds)
    cases = CASES
    if arguments.sides:
        passes = BOTH if device == "cuda" or arguments.smoke else ("training",)
        methods = (UNFUSED, SDPA, LINEAR, GATED, ONE_WAY)
        cases = tuple(Case("S", side, methods, passes, arguments.layers) for side in arguments.sides)
    machine: dict[str, Any] = environment(device)
    if device == "cpu":
        torch.set_num_threads(1)
        machine |= {"device": "cpu", "machine": cpu_name(), "threads": 1}
    report: dict[str, Any] = {"environment": machine, "rows": [], "heads": []}
    check(cases, device)

    def store(table: str, rows: list[dict[str, Any]]) -> None:
        report[table] += rows
        for row in rows:
            print(json.dumps(row), flush=True)
        if not arguments.smoke:  # after every row: what was measured stays if time runs out
            write("dit", arguments.output, report)

    for case in cases:
        for name in case.passes:
            store("rows", [compare(case, name, *limits)])
    for side in dict.fromkeys(case.side for case in cases) if arguments.sides else (CASES[-1].side,):
        for model in ("S", "B"):
            store("heads", compare_heads(model, side, *limits))


if __name__ == "__main__":
    main()
