"""The command line: `diffusers-linattn samples|distill|evaluate|push|pull|info`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from diffusers_linattn.cli.arguments import Run, explain_unknown
from diffusers_linattn.cli.config_file import with_config_file
from diffusers_linattn.cli.distill_command import add_distill
from diffusers_linattn.cli.evaluate_command import add_evaluate
from diffusers_linattn.cli.samples_command import add_samples
from diffusers_linattn.cli.sharing_commands import add_info, add_pull, add_push
from diffusers_linattn.version import __version__


# A command: a function that adds its arguments to a parser and returns what runs them.
COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {
    "samples": add_samples,
    "distill": add_distill,
    "evaluate": add_evaluate,
    "push": add_push,
    "pull": add_pull,
    "info": add_info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Without the name of the program; `None` takes those of the process.

    Returns:
        The exit status: 0, 1 after an error that was explained, 2 for arguments that make no sense, 130 after SIGINT,
        143 after SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="diffusers-linattn",
        description="Linear-cost attention for the diffusion transformers of diffusers.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffusers-linattn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {}
    for name, add in COMMANDS.items():
        described = (add.__doc__ or "").strip()
        # Abbreviations would keep flags from being told apart from those of a file.
        parsers[name] = commands.add_parser(name, help=described, description=described, allow_abbrev=False)
        parsers[name].set_defaults(run=add(parsers[name]))
    command = given[0] if given and given[0] in COMMANDS else parser.prog
    try:
        with _terminated_cleanly():
            if command in COMMANDS:
                given = [command, *with_config_file(parsers[command], given[1:])]
            options, unknown = parser.parse_known_args(given)
            if unknown:
                explain_unknown(parsers[options.command], unknown)
            options.run(options)
    except (OSError, ValueError) as error:
        print(f"{parser.prog} {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"{parser.prog} {command}: {str(interrupt) or 'Stopped.'}", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


@contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """SIGTERM ends the program as an exception does: temporary files go, locks are given back."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
