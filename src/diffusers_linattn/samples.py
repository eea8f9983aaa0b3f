"""Samples that a pipeline makes itself, kept on disk: what its attention is distilled on."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffusers_linattn.files import read_json, write_atomically, write_json
from diffusers_linattn.linearize import original_attention, single_transformer_of
from diffusers_linattn.models import find_family
from diffusers_linattn.ops.checks import check_positive_int
from diffusers_linattn.tracker import LayoutTracker


MANIFEST_NAME = "manifest.json"
SAMPLES_PER_SHARD = 64
FORMAT_VERSION = 1
ONE_TRANSFORMER = "distillation covers pipelines with one. The attention of all can be swapped with linearize."


@dataclass(frozen=True)
class Batch:
    """Samples of one resolution, ready for a training step.

    Args:
        latents: `(batch, ...)` final latents in the form that the transformer takes them.
        arguments: The other arguments of the transformer's forward, except the timestep.
    """

    latents: torch.Tensor
    arguments: dict[str, torch.Tensor]


class Samples:
    """A directory written by [`make_samples`], opened for reading.

    Raises:
        ValueError: No manifest, a manifest of another format, or a missing or altered shard.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.manifest = read_json(self.directory / MANIFEST_NAME)
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{self.directory / MANIFEST_NAME} has format_version {self.manifest.get('format_version')!r}, "
                f"expected {FORMAT_VERSION}: make the samples again with make_samples."
            )
        for name, digest in self.manifest["shards"].items():
            path = self.directory / name
            if not path.exists() or _sha256(path) != digest:
                raise ValueError(
                    f"{path} is missing or altered: run make_samples again, it remakes what is not whole."
                )

    def __len__(self) -> int:
        return int(self.manifest["settings"]["num_samples"])

    @property
    def timestep_scale(self) -> float:
        """What the scheduler's timesteps are multiplied by before the transformer gets them."""
        return float(self.manifest["timestep_scale"])

    @cached_property
    def _by_resolution(self) -> dict[tuple[int, int], list[int]]:
        settings = self.manifest["settings"]
        groups: dict[tuple[int, int], list[int]] = {}
        for index in range(len(self)):
            groups.setdefault(_resolution_of(settings, index), []).append(index)
        return groups

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {name: safe_open(self.directory / name, framework="pt") for name in self.manifest["shards"]}

    def _read(self, index: int, name: str) -> torch.Tensor:
        return self._files[_shard_name(index // SAMPLES_PER_SHARD)].get_tensor(name)

    def batch(self, size: int, generator: random.Random) -> Batch:
        """`size` samples of one resolution, drawn with replacement; each sample is equally likely."""
        resolutions = list(self._by_resolution)
        counts = [len(group) for group in self._by_resolution.values()]
        resolution = generator.choices(resolutions, counts)[0]
        indices = generator.choices(self._by_resolution[resolution], k=size)
        prompts = self.manifest["settings"]["prompts"]
        # The conditioning of a prompt lies in the shard of the first sample that uses it, which has its number.
        chosen = [index % len(prompts) for index in indices]
        arguments = {
            name: torch.stack([self._read(prompt, f"conditioning.{prompt}.{name}") for prompt in chosen])
            for name in self.manifest["conditioning"]
        }
        height, width = resolution
        for name in self.manifest["shared"]:
            arguments[name] = self._read(indices[0], f"shared.{height}x{width}.{name}")
        return Batch(torch.stack([self._read(index, f"latents.{index}") for index in indices]), arguments)


def make_samples(
    pipe: Any,
    prompts: Sequence[str] | str | Path,
    directory: str | Path,
    num_samples: int = 10_000,
    batch_size: int = 4,
    resolutions: Sequence[tuple[int, int]] | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    seed: int = 0,
    call_arguments: dict[str, Any] | None = None,
) -> Samples:
    """Let a pipeline make the samples that its attention is distilled on, and keep them on disk.

    Kept per sample: the final latents; per distinct prompt: every conditioning tensor that the transformer takes.
    The original attention makes them, whether the pipeline is converted or not. An interrupted run goes on where it
    stopped; sample i depends on `seed` and i, up to the rounding that another `batch_size` may bring.

    Args:
        pipe: A text-to-image pipeline of a flow-matching model.
        prompts: Prompts, or a text file with one per line. Sample i takes prompt i modulo their number.
        directory: Where to; made if it does not exist.
        num_samples: How many.
        batch_size: Samples made at a time.
        resolutions: `(height, width)` in pixels; each sample draws one. `None` is the pipeline's default.
        guidance_scale: As in the pipeline's call; `None` is its default.
        num_inference_steps: As in the pipeline's call; `None` is its default.
        seed: Seeds everything.
        call_arguments: More arguments for the pipeline's call, such as `{"max_sequence_length": 256}`.

    Returns:
        The samples, opened.

    Raises:
        ValueError: No prompts, a pipeline whose model is not trained by flow matching, that has several transformers,
            or whose transformer takes more than tensors, too little disk space, or a directory that holds samples of
            other settings.
    """
    prompts = _read_prompts(prompts)
    for name, number in (("num_samples", num_samples), ("batch_size", batch_size)):
        check_positive_int(name, number)
    _check_flow_matching(pipe)
    settings = {
        "num_samples": num_samples,
        "prompts": prompts,
        "resolutions": [list(resolution) for resolution in resolutions or []],
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
        "call_arguments": call_arguments or {},
    }
    try:
        settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists there
    except TypeError as error:
        raise ValueError(f"call_arguments must be JSON-able, to tell whether a run can go on: {error}.") from error
    directory = Path(directory)
    settings_path = directory / "settings.json"
    if settings_path.exists() and read_json(settings_path) != settings:
        raise ValueError(f"{directory} holds samples of other settings: use another directory or delete this one.")
    write_json(settings_path, settings)
    recorder = _Recorder(pipe, settings)
    manifest_path = directory / MANIFEST_NAME
    known = read_json(manifest_path)["shards"] if manifest_path.exists() else {}
    shards: dict[str, str] = {}
    with tqdm(total=num_samples, desc="samples", unit="sample") as progress:
        for first in range(0, num_samples, SAMPLES_PER_SHARD):
            indices = range(first, min(first + SAMPLES_PER_SHARD, num_samples))
            path = directory / _shard_name(first // SAMPLES_PER_SHARD)
            if _is_whole(path, indices) and known.get(path.name) in (None, _sha256(path)):
                progress.update(len(indices))
            else:
                tensors, metadata = recorder.make(indices, batch_size, progress)
                _check_disk(directory, tensors, num_samples - first, len(indices))
                write_atomically(path, _saver(tensors, metadata))
            shards[path.name] = _sha256(path)
    with safe_open(directory / _shard_name(0), framework="pt") as file:
        names = [name.split(".", 2) for name in file.keys()]
        scale = float(file.metadata()["timestep_scale"])
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "shards": shards,
        "timestep_scale": scale,
        "conditioning": sorted({name[2] for name in names if name[0] == "conditioning"}),
        "shared": sorted({name[2] for name in names if name[0] == "shared"}),
        "transformer": type(recorder.model).__name__,
    }
    write_json(manifest_path, manifest)
    return Samples(directory)


class _Recorder:
    """Runs the pipeline and records what its transformer is given."""

    def __init__(self, pipe: Any, settings: dict[str, Any]):
        self.pipe = pipe
        self.settings = settings
        self.model = single_transformer_of(pipe, ONE_TRANSFORMER)
        family = find_family(self.model)
        assert family is not None
        self.shared = family.shared
        self.names = LayoutTracker(self.model, family).names

    def make(self, indices: Iterable[int], batch_size: int, progress: Any) -> tuple[dict[str, torch.Tensor], dict]:
        """The tensors and metadata of one shard."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            groups.setdefault(_resolution_of(self.settings, index), []).append(index)
        tensors: dict[str, torch.Tensor] = {}
        scale = 1.0
        for resolution, group in groups.items():
            for start in range(0, len(group), batch_size):
                chosen = group[start : start + batch_size]
                latents, first_call, scale = self._run(chosen, resolution)
                for row, index in enumerate(chosen):
                    tensors[f"latents.{index}"] = latents[row]
                    if index < len(self.settings["prompts"]):
                        for name, value in first_call.items():
                            if name not in self.shared:
                                tensors[f"conditioning.{index}.{name}"] = value[row]
                for name in first_call.keys() & set(self.shared):
                    tensors[f"shared.{resolution[0]}x{resolution[1]}.{name}"] = first_call[name]
                progress.update(len(chosen))
        return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, {
            "timestep_scale": repr(scale)
        }

    def _run(
        self, indices: list[int], resolution: tuple[int, int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
        settings = self.settings
        calls: list[dict[str, Any]] = []

        def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not calls:
                calls.append({**dict(zip(self.names, args, strict=False)), **kwargs})

        arguments = dict(settings["call_arguments"])
        for name in ("guidance_scale", "num_inference_steps"):
            if settings[name] is not None:
                arguments[name] = settings[name]
        if settings["resolutions"]:
            arguments["height"], arguments["width"] = resolution
        # Seeded by a hash, so that neighbouring samples of neighbouring seeds do not share their noise.
        seeds = [int(_hash(settings["seed"], index)[:15], 16) for index in indices]
        handle = self.model.register_forward_pre_hook(record, with_kwargs=True)
        quiet = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(**{**quiet, "disable": True})
        try:
            with original_attention(self.pipe):
                latents = self.pipe(
                    prompt=[settings["prompts"][index % len(settings["prompts"])] for index in indices],
                    generator=[torch.Generator("cpu").manual_seed(value) for value in seeds],
                    output_type="latent",
                    return_dict=False,
                    **arguments,
                )[0]
        finally:
            handle.remove()
            self.pipe.set_progress_bar_config(**{"disable": False, **quiet})
        call = calls[0]
        _check_tensors(call, type(self.model).__name__)
        if call["hidden_states"].shape != latents.shape:
            raise ValueError(
                f"The transformer takes {tuple(call['hidden_states'].shape)} where the pipeline returns latents of "
                f"{tuple(latents.shape)}: distillation covers pipelines whose latents are the transformer's input."
            )
        scale = float(call["timestep"].flatten()[0]) / float(self.pipe.scheduler.timesteps[0])
        kept = {
            name: value
            for name, value in call.items()
            if isinstance(value, torch.Tensor) and name not in ("hidden_states", "timestep")
        }
        return latents, kept, round(scale, 9)


def _read_prompts(prompts: Sequence[str] | str | Path) -> list[str]:
    if isinstance(prompts, str | Path):
        path = Path(prompts)
        if not path.is_file():
            raise ValueError(f"prompts: {path} is no file; give a list of prompts or a text file with one per line.")
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError("prompts is empty: at least one prompt is needed.")
    # Conditioning is kept once per distinct prompt.
    return list(dict.fromkeys(prompts))


def _check_flow_matching(pipe: Any) -> None:
    scheduler = type(getattr(pipe, "scheduler", None)).__name__
    if not scheduler.startswith("FlowMatch"):
        raise ValueError(
            f"Distillation covers flow-matching models; {type(pipe).__name__} has a {scheduler}. Its attention can be "
            "swapped with linearize."
        )


def _check_tensors(call: dict[str, Any], transformer: str) -> None:
    """Raise if a call of the transformer has something in it that samples cannot hold."""
    empty = [name for name, value in call.items() if value is None or (isinstance(value, dict) and not value)]
    kept = [*empty, "return_dict", *(name for name, value in call.items() if isinstance(value, torch.Tensor))]
    lost = [name for name in call if name not in kept]
    if lost or "hidden_states" not in call:
        found = f"{lost[0]}, a {type(call[lost[0]]).__name__}" if lost else "no hidden_states"
        raise ValueError(
            f"Distillation covers transformers that take tensors; {transformer} was given {found}. Its attention can "
            "be swapped with linearize."
        )


def _resolution_of(settings: dict[str, Any], index: int) -> tuple[int, int]:
    if not settings["resolutions"]:
        return (0, 0)  # the pipeline's default
    height, width = random.Random(_hash(settings["seed"], index)).choice(settings["resolutions"])
    return int(height), int(width)


def _hash(seed: int, index: int) -> str:
    return hashlib.sha256(f"{seed}/{index}".encode()).hexdigest()


def _shard_name(number: int) -> str:
    return f"samples-{number:05d}.safetensors"


def _is_whole(path: Path, indices: Iterable[int]) -> bool:
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return {f"latents.{index}" for index in indices} <= set(file.keys())
    except SafetensorError:
        return False


def _saver(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Any:
    return lambda path: save_file(tensors, path, metadata=metadata)


def _check_disk(directory: Path, tensors: dict[str, torch.Tensor], samples_left: int, samples_here: int) -> None:
    need = sum(tensor.nbytes for tensor in tensors.values()) * samples_left / samples_here
    free = shutil.disk_usage(directory).free
    if need > free:
        raise ValueError(
            f"{directory} needs about {need / 1e9:.1f} GB more, but the disk has {free / 1e9:.1f} GB left."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
