"""Stored results of the benchmarks as tables and pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ROWS = [
    {"side": 64, "window": 8, "pass": "forward", "ms": {"ours": 2.0, "sdpa": 9.0}, "times_faster": {"sdpa": 4.5}},
    {"side": 128, "window": 8, "pass": "forward", "ms": {"ours": 3.0, "sdpa": "OutOfMemoryError: a | b"}},
    {"side": 128, "window": 8, "pass": "backward", "ms": {"ours": 7.0}, "times_faster": {"sdpa": 12.25}},
]


def show(result: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "show_results.py", result, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_a_table_and_a_picture(tmp_path: Path) -> None:
    result = tmp_path / "windowed.json"
    environment = {"device": "a GPU", "torch": "2.13", "date": "2026-11-22"}
    result.write_text(json.dumps({"environment": environment, "rows": ROWS}))
    shown = show(result, "--plot", tmp_path / "picture.png")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "device a GPU, torch 2.13, date 2026-11-22",
        "",
        "| side | window | pass | ms: ours | ms: sdpa | times_faster: sdpa |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 64 | 8 | forward | 2 | 9 | 4.5 |",
        "| 128 | 8 | forward | 3 | OutOfMemoryError: a / b |  |",
        "| 128 | 8 | backward | 7 |  | 12.25 |",
    ]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > picture.height > 100


def test_what_is_stored(tmp_path: Path) -> None:
    result = BENCHMARKS / "results" / "dit-cpu.json"
    rows = json.loads(result.read_text())["rows"]
    assert len(show(result).stdout.splitlines()) == 4 + len(rows)
    refused = show(result, "--plot", tmp_path / "picture.png")
    assert refused.stderr.strip() == "No row has a side and a speed-up: nothing to draw."
