"""Time and memory of linear and gated linear attention against softmax attention on this machine, as ratios.

On a CPU it counts the seconds of CPU time of one thread, to which other work on the machine hardly matters.

Memory is what autograd keeps for the backward pass beyond the inputs and the output, in bytes per token.

Usage: python benchmarks/linear_attention.py [--output FILE] [--rounds 3] [--device cpu]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops.gated import gated_linear_attention
from diffusers_linattn.ops.linear import linear_attention
from diffusers_linattn.processors.attention_call import AttentionCall
from diffusers_linattn.processors.linear import LinearProcessor


HEADS, HEAD_DIM = 4, 64
COMPARED, OURS_ALONE = (32, 64, 128), (256,)
SOFTMAX = "softmax"


def make_inputs(layout: TokenLayout, device: str, requires_grad: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    # As the projections of a model leave them.
    inputs = [torch.randn(1, layout.length, HEADS, HEAD_DIM, device=device).transpose(1, 2) for _ in range(4)]
    inputs[3] = F.logsigmoid(inputs[3]) / 16
    return [x.requires_grad_(requires_grad) for x in inputs]


def candidates(layout: TokenLayout, inputs: list[torch.Tensor]) -> dict[str, Callable[[], torch.Tensor]]:
    query, key, value, gate = inputs
    processor = LinearProcessor(reset_projections=True)
    processor.build(HEADS, HEAD_DIM, HEADS * HEAD_DIM, 0)
    call = AttentionCall(query, key, value, layout, None, None, False, hidden_states=query)
    return {
        "linear": lambda: linear_attention(query, key, value, layout),
        "LinearProcessor, 5x5": lambda: processor.attend(call),
        "gated, one way": lambda: gated_linear_attention(query, key, value, gate, layout, direction="forward"),
        "gated, both ways": lambda: gated_linear_attention(query, key, value, gate, layout),
        SOFTMAX: lambda: F.scaled_dot_product_attention(query, key, value),
    }


def check(device: str) -> None:
    """A speed-up of a wrong result is none."""
    layout = TokenLayout.image((1, 12, 15))
    query, key, value, gate = make_inputs(layout, device)
    for name, function, arguments in (
        ("linear", linear_attention, (query, key, value, layout)),
        ("gated", gated_linear_attention, (query, key, value, gate, layout)),
    ):
        expected = function(*arguments, impl="reference")
        torch.testing.assert_close(function(*arguments), expected, atol=1e-5, rtol=1e-5, msg=f"{name} is wrong")


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Shortest seconds of each function, all of them called in turn in every round."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if i > 0:  # the first round warms up
                seconds[name].append(clock() - start)
    return {name: min(times) for name, times in seconds.items()}


def kept_bytes(function: Callable[[], torch.Tensor], known: Iterable[torch.Tensor]) -> int:
    """What autograd keeps of a forward pass, each storage once, beyond `known` tensors and the result."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()  # the tensor itself would refer to the node that saves it, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()  # bound, so that nothing is freed and its address used again
    for x in (*known, result):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def measure(side: int, training: bool, rounds: int, device: str) -> tuple[dict[str, float], dict[str, int]]:
    layout = TokenLayout.image((1, side, side))
    inputs = make_inputs(layout, device, requires_grad=training)
    functions: dict[str, Callable[[], object]] = dict(candidates(layout, inputs))
    if side in OURS_ALONE:
        del functions[SOFTMAX]
    kept = {}
    if training:
        kept = {name: kept_bytes(function, inputs) for name, function in functions.items()}  # type: ignore[arg-type]
        functions = {name: lambda run=run: run().sum().backward() for name, run in functions.items()}  # type: ignore
    return interleaved(functions, rounds, device), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file; default: results/linear_attention-DEVICE.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    check(args.device)

    rows, first = [], {}
    print(f"{'tokens':>10} {'pass':>18} {'operator':>18} {'times faster than softmax':>26} {'time per token':>15}")
    for training in (False, True):
        for side in COMPARED + OURS_ALONE:
            times, kept = measure(side, training, args.rounds, args.device)
            for name in [name for name in times if name != SOFTMAX]:
                per_token = times[name] / side**2
                growth = per_token / first.setdefault((training, name), per_token)
                faster = round(times[SOFTMAX] / times[name], 2) if SOFTMAX in times else None
                rows.append(
                    {
                        "tokens": side**2,
                        "pass": "forward+backward" if training else "forward",
                        "operator": name,
                        "times_faster_than_softmax": faster,
                        "time_per_token_relative_to_smallest": round(growth, 2),
                    }
                )
                if kept:
                    rows[-1]["bytes_kept_per_token"] = round(kept[name] / side**2)
                print(f"{side:>6}x{side:<3} {rows[-1]['pass']:>18} {name:>18} {faster or '-':>26} {growth:>15.2f}")

    output = args.output or Path(__file__).parent / "results" / f"linear_attention-{args.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": "float32",
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "text_tokens": 0,
        "rounds": args.rounds,
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=2) + "\n")


def cpu_name() -> str:
    """The CPU's name as Linux knows it, else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
