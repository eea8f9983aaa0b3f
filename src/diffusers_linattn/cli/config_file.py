"""Flags from a file: what it says is put before the flags of the command line, which win."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers_linattn.files import read_json, read_text


FLAG = "--config"


def add_config_file(parser: argparse.ArgumentParser) -> None:
    """The flag that [`with_config_file`] follows."""
    parser.add_argument(
        FLAG,
        type=Path,
        metavar="FILE",
        help="YAML or JSON with any of these flags by name (learning_rate: 1e-4); flags given here win",
    )


def with_config_file(parser: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """The arguments of a command, after those of its `--config` file, if it has one.

    Raises:
        ValueError: A file that cannot be read, a name that is no flag, or a value that no flag takes.
    """
    path = _path_in(parser, given)
    if path is None:
        return list(given)
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    del actions["config"]
    flags = {name: option for name, action in actions.items() for option in action.option_strings}
    arguments: list[str] = []
    for key, value in _read(path).items():
        name = str(key).replace("-", "_")
        action = actions.get(name) or _by_flag(actions, name)
        if action is None:
            close = difflib.get_close_matches(name, flags, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"{path}: {key!r} is no setting of this command.{hint} See --help for all of them.")
        if not _is_given(action, given):
            arguments += _as_arguments(action, value, f"{path}: {key}")
    return [*arguments, *given]


def _path_in(parser: argparse.ArgumentParser, given: Sequence[str]) -> Path | None:
    if not any(FLAG in action.option_strings for action in parser._actions):
        return None
    finder = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    add_config_file(finder)
    path: Path | None = finder.parse_known_args(list(given))[0].config
    return path


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        content = read_json(path)
    else:
        import yaml

        try:
            content = yaml.safe_load(read_text(path))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist.") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected names of flags and their values.")
    return content


def _by_flag(actions: dict[str, argparse.Action], name: str) -> argparse.Action | None:
    flag = f"--{name.replace('_', '-')}"
    return next((action for action in actions.values() if flag in action.option_strings), None)


def _is_given(action: argparse.Action, given: Sequence[str]) -> bool:
    flags = tuple(f"{option}=" for option in action.option_strings)
    return any(argument in action.option_strings or argument.startswith(flags) for argument in given)


def _as_arguments(action: argparse.Action, value: Any, where: str) -> list[str]:
    """A value of the file as it would be written on the command line."""
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}, expected true or false.")
        if isinstance(action, argparse._StoreTrueAction):
            return [flag] if value else []
        return [flag if value else action.option_strings[1]]
    if isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}, which this flag does not take.")
    if action.nargs in ("*", "+"):
        return [flag, *map(str, value if isinstance(value, list) else [value])]
    if isinstance(action, argparse._AppendAction):
        return [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise ValueError(f"{where} is a list, expected one value.")
    if isinstance(value, dict):
        value = json.dumps(value)
    return [f"{flag}={'none' if value is None else value}"]
