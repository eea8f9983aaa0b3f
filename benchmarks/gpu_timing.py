"""What the GPU benchmarks share: timing of several methods in turn, memory, environment and the file of results."""

from __future__ import annotations

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def measure(
    runs: dict[str, Callable[[], Any]], device: str, seconds: float, head_start: float = 5
) -> dict[str, float | str]:
    """Median milliseconds of each, taking turns for about `seconds`; what fails has its error instead.

    The first turn compiles and does not count, unless `seconds` is 0: then it is the only one. On a GPU the host has
    `head_start` milliseconds to launch kernels before the clock starts, so that the time is that of the kernels alone;
    with 0 it is also that in which they wait for the host, as they do in a whole step of a model.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, float | str] = {}
    start = 0.0
    for turn in range(20):
        for name, run in runs.items():
            if name in failed or times.get(name, [0.0])[-1] > 1000:  # what takes over a second is timed once
                continue
            try:
                elapsed = _time(run, device, head_start)
            except Exception as error:  # one that fails, for whatever reason, must not hide the others
                failed[name] = in_short(error)
                continue
            if turn or not seconds:
                times.setdefault(name, []).append(elapsed)
        if not turn:
            start = time.perf_counter()
        if not seconds or (turn >= 3 and time.perf_counter() - start > seconds):
            break
    return {name: round(statistics.median(values), 4) for name, values in times.items()} | failed


def in_short(error: Exception) -> str:
    """Its name, and the first and the last line of what it says: Triton's begin with the place in the source."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))[:300]}"


def _time(run: Callable[[], Any], device: str, head_start: float) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # Inputs that lie in the cache after the turn before would make small sizes look faster than memory allows. What is
    # read instead can leave the cache at no cost, other than what would be written.
    _more_than_the_cache().sum()
    if head_start:
        torch.cuda._sleep(int(head_start * 2e6))  # cycles, of some 2 GHz
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


@functools.cache
def _more_than_the_cache() -> torch.Tensor:
    """256 MB on the GPU, at least twice an L2 cache."""
    return torch.zeros(2**26, device="cuda")


def extra_megabytes(run: Callable[[], Any], device: str) -> float | None:
    """Peak memory of a pass beyond its inputs and results."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    del result
    return round((torch.cuda.max_memory_allocated() - before - kept) / 2**20, 1)


def environment(device: str) -> dict[str, Any]:
    import triton

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(name: str, folder: Path, report: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    device = report["environment"]["device"].lower().replace(" ", "-")
    (folder / f"{name}-{device}.json").write_text(json.dumps(report, indent=2) + "\n")


def copy_bandwidth() -> float:
    """TB/s of a copy, read and write counted: what the memory of this GPU gives."""
    source = torch.randint(256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = measure({"copy": lambda: target.copy_(source)}, "cuda", 0.2)["copy"]
    assert isinstance(milliseconds, float)
    return 2 * source.numel() / milliseconds / 1e9
