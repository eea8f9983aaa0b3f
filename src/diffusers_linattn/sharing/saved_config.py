"""The configuration of saved linear attention: written from processors, read back without trusting it.

`docs/format.md` specifies it. What a file says is matched against closed lists and bounds before anything is built
from it: there is no way from a configuration to an import.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers_linattn.lora import LowRank
from diffusers_linattn.processors import BaseProcessor, ClearProcessor, GLAProcessor, HybridProcessor, LinearProcessor
from diffusers_linattn.version import __version__


CONFIG_NAME = "linear_attention_config.json"
# The key under which each safetensors file carries a copy of the configuration.
CONFIG_KEY = "linear_attention_config"
FORMAT_VERSION = 2
MAX_CONFIG_BYTES = 1 << 20
MAX_LAYERS = 1_000
MAX_NAME_LENGTH = 256
MAX_RANK = 1_024
PROCESSORS: dict[str, type[BaseProcessor]] = {
    "clear": ClearProcessor,
    "gla": GLAProcessor,
    "hybrid": HybridProcessor,
    "linear": LinearProcessor,
}
# Sizes of weights grow with some of these, so that a file could ask for any amount of memory. The others are bounded
# by the default.
ARGUMENT_LIMITS = {"down_factor": 64, "kernel_size": 63, "gate_low_rank": 1_024}
DEFAULT_ARGUMENT_LIMIT = 65_536

_TOP_LEVEL = {
    "base_model",
    "base_model_revision",
    "format_version",
    "layers",
    "library_version",
    "metrics",
    "recipe",
    "transformer",
}


@dataclass(frozen=True)
class SavedLayer:
    """What is saved of one attention layer.

    Args:
        processor: A template of its processor.
        weights: Names of the layer's own weights that were replaced, such as `"to_q.weight"`.
        lora: Low-rank matrices by the module that they are added to, such as `"to_q"`.
    """

    processor: BaseProcessor
    weights: tuple[str, ...] = ()
    lora: Mapping[str, LowRank] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedConfig:
    """What is saved besides tensors.

    Args:
        transformer: Class of the transformer.
        layers: By module name.
        base_model: Hub id of the model that the weights were made for, if known.
        base_model_revision: Its commit, if known.
        recipe: How the weights were trained, if they were distilled.
        metrics: Named results.
        library_version: What wrote it.
    """

    transformer: str
    layers: Mapping[str, SavedLayer]
    base_model: str | None = None
    base_model_revision: str | None = None
    recipe: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    library_version: str = __version__

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "base_model": self.base_model,
            "base_model_revision": self.base_model_revision,
            "format_version": FORMAT_VERSION,
            "layers": {name: _layer_to_json(layer) for name, layer in self.layers.items()},
            "library_version": self.library_version,
            "metrics": dict(self.metrics),
            "recipe": None if self.recipe is None else dict(self.recipe),
            "transformer": self.transformer,
        }

    def same_tensors(self, other: SavedConfig) -> bool:
        """Whether both describe the same conversion, whatever they say of its origin."""
        mine, theirs = self.to_json(), other.to_json()
        return all(mine[key] == theirs[key] for key in ("layers", "transformer"))


def kind_of(processor: BaseProcessor) -> str:
    """The name of a processor's class in files."""
    kind = next((name for name, cls in PROCESSORS.items() if processor.plain_class is cls), None)
    if kind is None:
        raise ValueError(f"{type(processor).__name__} cannot be saved: only {', '.join(PROCESSORS)} have a format.")
    return kind


def check_readable(config: SavedConfig) -> None:
    """Raise the ValueError that reading what is to be written would raise."""
    parse_config(config.to_json(), "What would be saved")


def parse_config(content: Any, where: str) -> SavedConfig:
    """Read what [`SavedConfig.to_json`] wrote.

    Args:
        content: Parsed JSON from anyone.
        where: What it is, for errors.

    Raises:
        ValueError: Another format version, unknown keys or processors, or values out of their bounds.
    """
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict) or not content["layers"]:
        raise ValueError(f"{where} does not describe converted layers: was it written by save_linear_attention?")
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        raise ValueError(
            f"{where} has format_version {_short(version)}, this diffusers_linattn {__version__} reads "
            f"{FORMAT_VERSION}. It was saved by {_short(content.get('library_version'))}: "
            + ("load it with that version and save it again." if older else "upgrade diffusers-linattn.")
        )
    if unknown := sorted(set(content) - _TOP_LEVEL):
        raise ValueError(f"{where} has unknown keys {_short(unknown)}: expected {', '.join(sorted(_TOP_LEVEL))}.")
    if missing := sorted(_TOP_LEVEL - set(content)):
        raise ValueError(f"{where} misses {', '.join(missing)}.")
    for key, optional in (("transformer", False), ("library_version", False), ("base_model", True)):
        _check_string(content[key], f"{where}: {key}", optional)
    _check_string(content["base_model_revision"], f"{where}: base_model_revision", True)
    if content["recipe"] is not None and not isinstance(content["recipe"], dict):
        raise ValueError(f"{where}: recipe must be an object or null.")
    if len(content["layers"]) > MAX_LAYERS:
        raise ValueError(f"{where} converts {len(content['layers'])} layers; at most {MAX_LAYERS} are read.")
    return SavedConfig(
        transformer=content["transformer"],
        layers={name: _parse_layer(name, entry, where) for name, entry in content["layers"].items()},
        base_model=content["base_model"],
        base_model_revision=content["base_model_revision"],
        recipe=content["recipe"],
        metrics=check_metrics(content["metrics"], where),
        library_version=content["library_version"],
    )


def check_metrics(metrics: Any, where: str) -> dict[str, float]:
    """`metrics` if it maps names to finite numbers, else a ValueError."""
    if not isinstance(metrics, Mapping):
        raise ValueError(f"{where}: metrics must map names to numbers, got {_short(metrics)}.")
    for name, value in metrics.items():
        _check_string(name, f"{where}: the name of a metric")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -sys.float_info.max <= value <= sys.float_info.max:  # of an int, isfinite may overflow
            raise ValueError(f"{where}: the metric {_short(name)} must be a finite number, got {_short(value)}.")
    return dict(metrics)


def _layer_to_json(layer: SavedLayer) -> dict[str, Any]:
    arguments = layer.processor.to_config()
    del arguments["impl"]  # a matter of the machine, not of the weights
    entry = {"arguments": arguments, "processor": kind_of(layer.processor), "weights": list(layer.weights)}
    if layer.lora:
        entry["lora"] = {name: {"rank": lora.rank, "scale": lora.scale} for name, lora in layer.lora.items()}
    return entry


def _parse_layer(name: str, entry: Any, where: str) -> SavedLayer:
    _check_string(name, f"{where}: the name of a layer")
    place = f"{where}: {name}"
    required = {"processor", "arguments", "weights"}
    if not isinstance(entry, dict) or not required <= set(entry) <= {*required, "lora"}:
        raise ValueError(
            f"{place}: expected the keys processor, arguments, weights and perhaps lora, got {_short(entry)}."
        )
    weights = entry["weights"]
    if not isinstance(weights, list):
        raise ValueError(f"{place}: weights must be a list of names, got {_short(weights)}.")
    for weight in weights:
        _check_string(weight, f"{place}: the name of a weight")
    if len(set(weights)) != len(weights):
        raise ValueError(f"{place}: weights names {_short(weights)} more than once.")
    return SavedLayer(
        _parse_processor(entry["processor"], entry["arguments"], place),
        tuple(weights),
        _parse_lora(entry.get("lora", {}), place),
    )


def _parse_processor(kind: Any, arguments: Any, place: str) -> BaseProcessor:
    cls = PROCESSORS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(f"{place}: unknown processor {_short(kind)}, expected one of {', '.join(PROCESSORS)}.")
    if not isinstance(arguments, dict):
        raise ValueError(f"{place}: arguments must be an object, got {_short(arguments)}.")
    if "impl" in arguments:
        raise ValueError(f"{place}: impl is chosen on the machine that runs, it cannot stand in a file.")
    for name, value in arguments.items():
        _check_string(name, f"{place}: the name of an argument")
        if not isinstance(value, bool | int | float | str | None):
            raise ValueError(f"{place}: {name} must be a number, a string, true, false or null, got {_short(value)}.")
        limit = ARGUMENT_LIMITS.get(name, DEFAULT_ARGUMENT_LIMIT)
        if isinstance(value, int | float) and abs(value) > limit:
            raise ValueError(f"{place}: {name} is {_short(value)}, at most {limit} is read from files.")
        if isinstance(value, str):
            _check_string(value, f"{place}: {name}")
    try:
        return cls.from_config(arguments)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _parse_lora(content: Any, place: str) -> dict[str, LowRank]:
    if not isinstance(content, dict):
        raise ValueError(f"{place}: lora must map modules to ranks and scales, got {_short(content)}.")
    parsed = {}
    for module, entry in content.items():
        _check_string(module, f"{place}: the name of a module with a LoRA")
        if not isinstance(entry, dict) or set(entry) != {"rank", "scale"}:
            raise ValueError(f"{place}: the LoRA of {module} needs rank and scale, got {_short(entry)}.")
        rank, scale = entry["rank"], entry["scale"]
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise ValueError(f"{place}: the rank of {module} must be from 1 to {MAX_RANK}, got {_short(rank)}.")
        if type(scale) not in (int, float) or not abs(scale) <= 1e6:
            raise ValueError(f"{place}: the scale of {module} must be a number up to 1e6, got {_short(scale)}.")
        parsed[module] = LowRank(rank, float(scale))
    return parsed


def _check_string(value: Any, what: str, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, str) or not value or len(value) > MAX_NAME_LENGTH or not value.isprintable():
        raise ValueError(
            f"{what} must be a string of 1 to {MAX_NAME_LENGTH} printable characters, got {_short(value)}."
        )


def _short(value: Any) -> str:
    return reprlib.repr(value)
