"""Reading text and JSON, and writing files so that a reader never sees half of one."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, with sorted keys: the same content gives the same bytes."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path, max_bytes: int | None = None) -> Any:
    """Read JSON.

    Args:
        path: The file.
        max_bytes: Refuse a larger file, unread.

    Raises:
        ValueError: The file is missing, too large, or not JSON as [`parse_json`] takes it.
    """
    try:
        size = path.stat().st_size
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{path} has {size} bytes; at most {max_bytes} are read.")
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is not a regular file.")
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None


def as_read_back(content: Any, problem: str) -> Any:
    """Content as it will be read back from JSON: tuples are lists there.

    Raises:
        ValueError: It cannot be written, or holds NaN or infinity; the message begins with `problem`.
    """
    try:
        return json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{problem}: {error}.") from error


def nearest_existing(path: Path) -> Path:
    """The path itself, or the first of the folders around it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark, its lines ended by `"\\n"` however the file ends them.

    `str.splitlines` would also cut lines at characters that may stand in a prompt, such as U+2028: split at `"\\n"`.

    Raises:
        ValueError: The file is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: save it as such.") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file of prompts, without empty ones and without spaces around them.

    Raises:
        ValueError: There is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"prompts: {path} is no file; give a list of prompts or a text file with one per line.")
    lines = [line.strip() for line in read_text(path).split("\n")]
    return [line for line in lines if line]


def parse_json(text: bytes | str, where: str) -> Any:
    """Parse strict JSON: names once per object, finite numbers.

    Args:
        text: The JSON, UTF-8 if bytes.
        where: What it is, for errors.

    Raises:
        ValueError: Anything else.

    Example:
        >>> parse_json('{"window": 8, "window": 16}', "config.json")
        Traceback (most recent call last):
        ValueError: config.json is not valid JSON: the name 'window' stands twice in one object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the name {twice[:100]!r} stands twice in one object")
        return content

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number[:100]} is not a finite number")
        return value

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}.") from error
