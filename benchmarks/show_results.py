"""Prints a stored result as a Markdown table, and draws how the speed-ups grow with the size of the picture.

    python benchmarks/show_results.py benchmarks/results/windowed-*.json --plot windowed.png

The plot has a panel per pass and a line per setting and method that is not ours, for results whose rows have a `side`,
in tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


Row = dict[str, Any]

# What tells the rows of a table apart; the rest was measured.
SETTINGS = ("case", "shape", "window", "compiled_blocks")


def flat(row: Row) -> dict[str, str]:
    """Every number of a row by the names that lead to it, as they are printed."""
    cells = {}
    for name, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{name}: {inner}": text for inner, text in flat(value).items()}
        elif isinstance(value, bool) or value is None:
            cells[name] = {True: "yes", False: "no", None: ""}[value]
        else:
            cells[name] = f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
    return cells


def table(rows: list[Row]) -> str:
    """The rows in Markdown; a column for every name that any of them has."""
    cells = [flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in cells for name in row))
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lines_of(rows: list[Row]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By pass and by what a line stands for: sides and times faster."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        setting = [f"{name} {row[name]}" for name in SETTINGS if name in row]
        for method, ratio in row.get("times_faster", {}).items():
            if "side" in row and isinstance(ratio, float) and not method.startswith("ours"):
                lines = panels.setdefault(row.get("pass", "step"), {})
                lines.setdefault(", ".join([*setting, f"than {method}"]), []).append((row["side"], ratio))
    return panels


def plot(report: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = lines_of(report["rows"])
    if not panels:
        raise SystemExit("No row has a side and a speed-up: nothing to draw.")
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), sharey=True, squeeze=False)
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        sides = sorted({side for points in lines.values() for side, _ in points})
        axis.set(title=name, xlabel="tokens along a side", xscale="log", yscale="log")
        axis.set_xticks(sides, [str(side) for side in sides])
        axis.minorticks_off()
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.legend(fontsize="small")
    axes[0, 0].set_ylabel("times faster")
    environment = report["environment"]
    figure.suptitle(f"{environment['device']}, torch {environment['torch']}, {environment['date']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a file of benchmarks/results")
    parser.add_argument("--plot", type=Path, help="the picture to write")
    arguments = parser.parse_args()
    report = json.loads(arguments.result.read_text())
    print(", ".join(f"{name} {value}" for name, value in report["environment"].items()), end="\n\n")
    print(table(report["rows"]))
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
