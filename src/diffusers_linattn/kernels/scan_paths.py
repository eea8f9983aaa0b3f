"""The ways that a gated scan walks a grid, each as one integer that layers of one compiled block can differ in."""

from __future__ import annotations


DIRECTIONS = ("forward", "backward", "bidirectional")
ORDERS = ("rows", "columns")

# Traced as a size: 0 and 1 are never symbolic, and a size that another dimension has, too, is taken for that one.
_FIRST_PATH = 1_000_003


def scan_path(direction: str, order: str) -> int:
    """Order and direction of a scan as one integer: a `path`."""
    return _FIRST_PATH + 2 * ORDERS.index(order) + (direction == "backward")


def describe_path(path: int, both: bool) -> tuple[str, str]:
    """The inverse of [`scan_path`]: direction and order."""
    if path not in range(_FIRST_PATH, _FIRST_PATH + 4):
        raise ValueError(f"path is {path!r}, which scan_path never gives: pass direction and order instead.")
    columns, backward = divmod(path - _FIRST_PATH, 2)
    return "bidirectional" if both else DIRECTIONS[backward], ORDERS[columns]
