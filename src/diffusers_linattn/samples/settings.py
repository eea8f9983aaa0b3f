"""What a directory of samples is made from, checked before anything is made."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_linattn.files import as_read_back, read_json, read_lines
from diffusers_linattn.generation import scheduler_of
from diffusers_linattn.linearize import single_transformer_of
from diffusers_linattn.ops.checks import check_positive_int
from diffusers_linattn.samples.fingerprint import check_fingerprint, fingerprint
from diffusers_linattn.samples.recorder import ONE_TRANSFORMER


FORMAT_VERSION = 2
SETTINGS_NAME = "settings.json"
DEFAULT_SIZE = (0, 0)  # the pipeline's own


@dataclass(frozen=True)
class Assignment:
    """Which prompt and which resolution each sample has.

    Args:
        settings: As in `settings.json`.
    """

    settings: dict[str, Any]

    @property
    def num_samples(self) -> int:
        """How many samples there are."""
        return int(self.settings["num_samples"])

    @property
    def prompts(self) -> list[Any]:
        """The distinct prompts or class labels."""
        return self.settings["prompts"]

    def prompt(self, index: int) -> int:
        """The number of a sample's prompt."""
        pictures = self.settings.get("pictures")
        return int(pictures[index]["prompt"]) if pictures else index % len(self.prompts)

    def size(self, index: int) -> tuple[int, int]:
        """The `(height, width)` of a sample in pixels; `(0, 0)` is the pipeline's default."""
        pictures, sizes = self.settings.get("pictures"), self.settings["resolutions"]
        if pictures:
            height, width = pictures[index]["resolution"]
        elif not sizes:
            height, width = DEFAULT_SIZE
        else:
            height, width = random.Random(self._hash(index)).choice(sizes)
        return int(height), int(width)

    def seed(self, index: int) -> int:
        """The seed of a sample's noise: by a hash, so that neighbours of other seeds do not share it."""
        return int(self._hash(index)[:15], 16)

    def sizes(self) -> list[tuple[int, int]]:
        """The resolutions that samples have, in the order of their first samples."""
        possible = {tuple(size) for size in self.settings["resolutions"]} or {DEFAULT_SIZE}
        found: dict[tuple[int, int], None] = {}
        for index in range(self.num_samples):
            found[self.size(index)] = None
            if len(found) == len(possible):  # there may be any number of samples, of a few sizes
                break
        return list(found)

    def sizes_of_prompts(self) -> list[list[tuple[int, int]]]:
        """By prompt, the resolutions of its samples."""
        found: list[dict[tuple[int, int], None]] = [{} for _ in self.prompts]
        for index in range(self.num_samples):
            found[self.prompt(index)][self.size(index)] = None
        return [list(sizes) for sizes in found]

    def _hash(self, index: int) -> str:
        return hashlib.sha256(f"{self.settings['seed']}/{index}".encode()).hexdigest()


def read_prompts(prompts: Any, num_samples: int, of_classes: bool, num_classes: int | None) -> list[Any]:
    """The distinct prompts that so many samples need, from a list, a column of a dataset, or a text file.

    Raises:
        ValueError: None at all, or one that is empty or of another kind than the pipeline takes.
    """
    if isinstance(prompts, str | Path):
        prompts = [int(line) if of_classes and line.isdigit() else line for line in read_lines(Path(prompts))]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is a {type(prompts).__name__}, expected a list, a text file or a dataset's column.")
    distinct: dict[Any, None] = {}
    for i, prompt in enumerate(prompts):
        distinct[
            check_label(prompt, f"prompts[{i}]", num_classes) if of_classes else check_prompt(prompt, f"prompts[{i}]")
        ] = None
        if len(distinct) == num_samples:
            break
    if not distinct:
        raise ValueError("prompts is empty: at least one prompt is needed.")
    return list(distinct)


def check_prompt(prompt: Any, where: str) -> str:
    """Raise unless a prompt is a string with something in it."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where} is {prompt!r}, expected a prompt: a string that is not empty.")
    return prompt


def check_label(label: Any, where: str, num_classes: int | None) -> int:
    """Raise unless a class label is one of the model's."""
    expected = "a class label, an integer" + (f" from 0 to {num_classes - 1}" if num_classes else "")
    try:
        number = operator.index(label)
    except TypeError:
        number = -1
    if isinstance(label, bool) or number < 0 or (num_classes and number >= num_classes):
        raise ValueError(f"{where} is {label!r}, expected {expected}.")
    return number


def read_sizes(resolutions: Any) -> list[list[int]]:
    """Resolutions as JSON.

    Raises:
        ValueError: One that is not a pair of positive integers, or none in a list.
    """
    if resolutions is None:
        return []
    if not isinstance(resolutions, Iterable) or isinstance(resolutions, str):
        raise ValueError(
            f"resolutions is {resolutions!r}, expected a list of (height, width) in pixels, such as [(1024, 1024)]."
        )
    found = []
    for i, resolution in enumerate(resolutions):
        if not isinstance(resolution, list | tuple) or len(resolution) != 2:
            raise ValueError(f"resolutions[{i}] is {resolution!r}, expected (height, width) in pixels.")
        for number in resolution:
            check_positive_int(f"resolutions[{i}]", number)
        found.append([int(number) for number in resolution])
    if not found:
        raise ValueError("resolutions is empty: give at least one (height, width), or None for the default.")
    return found


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """What of a pipeline decides its samples, as far as its configuration tells."""
    model, scheduler = single_transformer_of(pipe, ONE_TRANSFORMER), scheduler_of(pipe)
    return {
        "pipeline": type(pipe).__name__,
        "transformer": type(model).__name__,
        "transformer_config": _public(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": _public(scheduler.config),
    }


def make_settings(
    pipe: Any,
    num_samples: int,
    prompts: list[Any],
    resolutions: Any,
    seed: int,
    call_arguments: dict[str, Any],
    **further: Any,
) -> dict[str, Any]:
    """What `settings.json` says of a directory, as it will be read back.

    Raises:
        ValueError: Resolutions that are none, or arguments of the call that are not JSON-able.
    """
    settings = {
        "format_version": FORMAT_VERSION,
        "num_samples": num_samples,
        "prompts": prompts,
        "resolutions": read_sizes(resolutions),
        "seed": seed,
        "call_arguments": call_arguments,
        "model": describe_pipeline(pipe),
        **further,
    }
    if "pictures" not in further:  # what is encoded does not depend on the transformer's weights
        settings["model"]["weights"] = fingerprint(single_transformer_of(pipe, ONE_TRANSFORMER))
    read: dict[str, Any] = as_read_back(settings, "call_arguments must be JSON-able, to tell whether a run can go on")
    return read


def prediction_of(scheduler: str, config: Mapping[str, Any]) -> str:
    """What a model predicts, as its scheduler's class and configuration say: a `prediction_type` of diffusers."""
    # A schedule along the straight line makes no sense for anything else, whatever the entry beside it says.
    if "FlowMatch" in scheduler or config.get("use_flow_sigmas"):
        return "flow_prediction"
    return str(config.get("prediction_type", "epsilon"))


def check_model(settings: dict[str, Any], pipe: Any, where: Path) -> None:
    """Raise unless the samples were made by this model, in whatever dtype, with what it predicts."""
    model, made = describe_pipeline(pipe), settings["model"]
    if made["transformer"] != model["transformer"]:
        raise ValueError(
            f"{where} holds samples of a {made['transformer']}, the pipeline has a {model['transformer']}: make "
            "samples with this pipeline."
        )
    _check_config(made["transformer_config"], model["transformer_config"], f"{where} holds samples of a transformer")
    predictions = [prediction_of(part["scheduler"], part["scheduler_config"]) for part in (made, model)]
    if predictions[0] != predictions[1]:
        raise ValueError(
            f"{where} holds samples of a {made['scheduler']} ({predictions[0]}), the pipeline has a "
            f"{model['scheduler']} ({predictions[1]}): make samples with this pipeline."
        )
    weights = fingerprint(single_transformer_of(pipe, ONE_TRANSFORMER)) if made.get("weights") else {}
    check_fingerprint(made.get("weights", {}), weights, where, exact=False)


def open_directory(directory: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The content of `settings.json`, `None` where there is nothing yet.

    Raises:
        ValueError: The directory holds samples of other settings, or other things.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, expected a directory for samples.")
    path = directory / SETTINGS_NAME
    if not path.exists():
        others = (
            [entry.name for entry in directory.iterdir() if not entry.name.startswith(".")]
            if directory.exists()
            else []
        )
        if others:
            raise ValueError(f"{directory} holds {sorted(others)[0]} and no samples: give an empty directory.")
        return None
    content = read_json(path)
    made = content.get("settings", {})
    if made.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{directory} holds samples of another format: give another directory.")
    other = sorted(
        name for name in made.keys() | settings.keys() if name != "model" and made.get(name) != settings.get(name)
    )
    advice = "give those again, or another directory, or delete this one."
    if other:
        raise ValueError(f"{directory} holds samples of other settings ({', '.join(other)}): {advice}")
    for name, value in settings["model"].items():
        if name == "weights":  # directories of earlier versions have none
            check_fingerprint(made["model"].get(name, {}), value, directory, exact=True)
        elif isinstance(value, dict):
            _check_config(made["model"][name], value, f"{directory} holds samples of other settings: {name}")
        elif made["model"][name] != value:
            raise ValueError(
                f"{directory} holds samples of other settings: {name} was {made['model'][name]}, now {value}: {advice}"
            )
    return content


def _check_config(made: dict[str, Any], now: dict[str, Any], what: str) -> None:
    # Releases of diffusers add entries: those that both know must agree.
    for name in sorted(made.keys() & now.keys()):
        if made[name] != now[name]:
            raise ValueError(f"{what} with {name}={made[name]!r}, the pipeline's has {now[name]!r}.")


def _public(config: Any) -> dict[str, Any]:
    """A configuration as JSON, without what says where it came from or how it is stored."""
    kept = {k: v for k, v in dict(config).items() if not k.startswith("_") and k != "quantization_config"}
    # JSON has no infinity, which DPMSolverMultistepScheduler has in its defaults.
    kept = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in kept.items()}
    return json.loads(json.dumps(kept, default=str))
