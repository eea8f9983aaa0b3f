"""Arguments that several commands take, and what is made of them: a pipeline, a processor, a pipeline's call."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, patch_environment
from diffusers import DiffusionPipeline

from diffusers_linattn.generation import prompt_argument
from diffusers_linattn.linearize import linearize
from diffusers_linattn.processors import BaseProcessor
from diffusers_linattn.sharing.saved_config import PROCESSORS
from diffusers_linattn.weights import load_linear_attention


Run = Callable[[argparse.Namespace], None]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which pipeline, and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="ID_OR_PATH", help="the pipeline: a Hub id or a folder")
    group.add_argument("--revision", help="branch, tag or commit of the model")
    group.add_argument("--variant", help="such as fp16")
    group.add_argument("--dtype", choices=DTYPES, help="precision; without it bf16 on a GPU and fp32 on a CPU")
    group.add_argument("--device", help="such as cuda:1 or cpu; without it the one that accelerate chooses")


def load_pipeline(options: argparse.Namespace) -> Any:
    """The pipeline of `--model`, on its device."""
    device = start_process(options).device
    on_gpu = device.type not in ("cpu", "mps")
    dtype = DTYPES[options.dtype] if options.dtype else torch.bfloat16 if on_gpu else torch.float32
    pipe = DiffusionPipeline.from_pretrained(
        options.model, dtype=dtype, revision=options.revision, variant=options.variant
    )
    return pipe.to(device)


def start_process(options: argparse.Namespace) -> PartialState:
    """What accelerate knows of this process and of the others that it runs with, on the device of `--device`.

    Raises:
        ValueError: No device of that name, in torch or in this machine.
    """
    try:
        device = None if options.device is None else torch.device(options.device)
    except RuntimeError as error:
        raise ValueError(f"--device {options.device!r}: {error}") from error
    on_cpu = device is not None and device.type == "cpu"
    if device is not None and not on_cpu:
        _check_there(device)
    # accelerate has to be told of CPUs before it looks, or each of several processes believes to be alone.
    on_cpu = on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    given = {} if options.device is None else {"ACCELERATE_TORCH_DEVICE": options.device}
    with patch_environment(**given):
        return PartialState(cpu=on_cpu)


def _check_there(device: torch.device) -> None:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if found is not None and found.type == device.type else 0
    if (device.index or 0) >= count:
        have = f"{count} devices of this type" if count else f"no {device.type}"
        raise ValueError(
            f"--device {device}: torch {torch.__version__} finds {have} in this machine. Give cpu, or leave --device "
            "out for the best that there is."
        )


def is_main_process() -> bool:
    """Whether this is the process that speaks, of all that `accelerate launch` has started."""
    return bool(PartialState().is_main_process)


def add_attention(parser: argparse.ArgumentParser, loaded_by: str, loaded_help: str) -> None:
    """Which linear attention: a processor and its arguments, or one that was saved."""
    group = parser.add_argument_group("linear attention", "A processor with its arguments, or one that was saved.")
    kind = group.add_mutually_exclusive_group(required=True)
    kind.add_argument("--processor", choices=sorted(PROCESSORS), help="the mechanism, for every attention layer")
    kind.add_argument(loaded_by, dest="weights", metavar="REPO_OR_DIR", help=loaded_help)
    group.add_argument(
        "--layers",
        action="append",
        metavar="PATTERN",
        help="with --processor: convert only layers of this name, such as 'transformer_blocks.*'; repeatable",
    )
    group.add_argument("--weight-name", help=f"with {loaded_by}: one file of the repository, such as CLEAR's")
    for name, (hint, owners) in _processor_arguments().items():
        add_flag(group, name, hint, _explained_by(owners, name))


def processor_of(options: argparse.Namespace) -> BaseProcessor | None:
    """The processor that the options describe, `None` if one is loaded.

    Raises:
        ValueError: An argument that it does not have, or out of its range.
    """
    given = {name: getattr(options, name) for name in _processor_arguments() if hasattr(options, name)}
    if options.processor is None:
        extra = [*given, *(["layers"] if options.layers else [])]
        if extra:
            raise ValueError(f"{flag_of(extra[0])} goes with --processor; what is loaded has its own.")
        return None
    if options.weight_name:
        raise ValueError("--weight-name names a file to load, --processor starts afresh: leave one of them out.")
    cls = PROCESSORS[options.processor]
    for name in given:
        taken = _argument_names(cls)
        if name not in taken:
            raise ValueError(
                f"{flag_of(name)} is not an argument of {cls.__name__}, which takes {', '.join(map(flag_of, taken))}."
            )
    return cls(**given)


def convert(pipe: Any, processor: BaseProcessor | None, options: argparse.Namespace) -> None:
    """Put the processor into the pipeline, or load what is named instead of it."""
    if processor is None:
        load_linear_attention(pipe, options.weights, weight_name=options.weight_name)
    else:
        linearize(pipe, processor, layers=options.layers)


def add_call(parser: argparse.ArgumentParser) -> Any:
    """How pictures are drawn."""
    group = parser.add_argument_group("pictures")
    group.add_argument("--guidance-scale", type=float, help="as in the pipeline's call")
    group.add_argument("--num-inference-steps", type=int, help="as in the pipeline's call")
    group.add_argument(
        "--call",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the pipeline's call, the value in JSON: max_sequence_length=256; repeatable",
    )
    return group


def call_of_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `--call`.

    Raises:
        ValueError: No name, or a value that is no JSON.
    """
    arguments = {}
    for item in options.call:
        name, found, value = item.partition("=")
        if not found or not name.isidentifier():
            raise ValueError(f"--call needs NAME=VALUE, got {item!r}.")
        try:
            arguments[name] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--call {item}: {value!r} is not JSON ({error}). Text is written '\"…\"'.") from error
    return arguments


def resolution(text: str) -> tuple[int, int]:
    """`"768x1344"` as (height, width)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, such as 1024x1024, got {text!r}")
    return int(match[1]), int(match[2])


def class_labels(text: str) -> list[int]:
    """`"0-3,7"` as numbers."""
    labels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"expected class labels such as 0-999 or 1,5,7, got {text!r}")
        labels += range(int(match[1]), int(match[2] or match[1]) + 1)
    return labels


def check_takes_classes(pipe: Any, options: argparse.Namespace) -> None:
    """Raise if there are `--classes` for a pipeline that takes prompts."""
    if options.classes and prompt_argument(pipe) != "class_labels":
        raise ValueError(f"{type(pipe).__name__} takes prompts, not classes: give --prompts FILE.")


def labels_if_classes(pipe: Any, prompts: Any) -> Any:
    """Words of the command line as numbers, where the pipeline takes class labels."""
    if prompt_argument(pipe) != "class_labels":
        return prompts
    return [int(prompt) if str(prompt).isdecimal() else prompt for prompt in prompts]


def add_flag(group: Any, name: str, hint: Any, help: str) -> None:
    """A flag for a setting of that type; absent from the options unless it is given."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not NoneType]
    optional = NoneType in typing.get_args(hint)
    origin = typing.get_origin(hint)
    if help:
        help = help.replace("%", "%%")
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help}
    if hint is bool:
        group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, **options)
    elif origin is tuple:
        group.add_argument(flag_of(name), nargs="*", metavar="TEXT", **options)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        group.add_argument(flag_of(name), type=_json_object, metavar="JSON", **options)
    else:
        (kind,) = kinds
        convert = _or_none(kind) if optional else kind
        metavar = {int: "N", float: "X"}.get(kind, "TEXT")
        group.add_argument(flag_of(name), type=convert, metavar=metavar, **options)


def explain_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Leave with the usage of a command, and the flag that may have been meant by one that it does not have."""
    flag = next((word for word in unknown if word.startswith("-")), "").partition("=")[0]
    close = difflib.get_close_matches(flag.replace("_", "-"), parser._option_string_actions, n=1)
    parser.error(f"unrecognized arguments: {' '.join(unknown)}.{f' Did you mean {close[0]}?' if close else ''}")


def default_text(value: Any) -> str:
    """A default as a help text names it."""
    if value in ((), {}, None):
        return "default: none"
    if isinstance(value, bool):
        return f"default: {'on' if value else 'off'}"
    return f"default: {value}"


def flag_of(name: str) -> str:
    """`"down_factor"` as `"--down-factor"`."""
    return f"--{name.replace('_', '-')}"


def _or_none(kind: type) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in errors
    return convert


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object such as '{{\"weight_decay\": 0.01}}', got {text!r}")
    return value


def _processor_arguments() -> dict[str, tuple[Any, list[str]]]:
    """All arguments of all processors: their type, and whose they are."""
    arguments: dict[str, tuple[Any, list[str]]] = {}
    for kind, cls in PROCESSORS.items():
        hints = typing.get_type_hints(cls.__init__)
        for name in _argument_names(cls):
            arguments.setdefault(name, (hints[name], []))[1].append(kind)
    return arguments


def _argument_names(cls: type) -> list[str]:
    return list(inspect.signature(cls).parameters)


def _explained_by(owners: list[str], name: str) -> str:
    """What an argument means, for each processor that has it, where they differ."""
    meanings: dict[str, list[str]] = {}
    for kind in owners:
        meanings.setdefault(_explained(PROCESSORS[kind], name), []).append(kind)
    return "; ".join(
        f"{', '.join(kinds)}: {meaning}{_default_for(kinds, name, meaning)}" for meaning, kinds in meanings.items()
    )


def _explained(cls: type, name: str) -> str:
    """What a class's docstring says about an argument."""
    match = re.search(rf"^ {{8}}{name} \(.*?\): (.*?)(?=^ {{8}}\w|^\s*$)", cls.__doc__ or "", re.DOTALL | re.MULTILINE)
    text = "" if match is None else " ".join(match[1].replace("`", "").split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _default_for(kinds: list[str], name: str, meaning: str) -> str:
    """The default of an argument that these processors share, each with its own where they differ."""
    defaults = {kind: inspect.signature(PROCESSORS[kind]).parameters[name].default for kind in kinds}
    values = list(dict.fromkeys(defaults.values()))
    if values == [None] and "None" in meaning:  # said already
        return ""
    if len(values) == 1:
        return f" ({default_text(values[0])})"
    return f" (default: {', '.join(f'{kind} {value}' for kind, value in defaults.items())})"
