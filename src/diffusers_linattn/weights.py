"""Save linearized attention to a folder and load it into another copy of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_linattn.files import read_json, write_atomically, write_json
from diffusers_linattn.linearize import Layer, fuse_again, install, is_quantized, layers_of, plan, transformers_of
from diffusers_linattn.processors import BaseProcessor, ClearProcessor, GLAProcessor, LinearProcessor
from diffusers_linattn.processors.base import fused_loras
from diffusers_linattn.version import __version__


PipelineOrModel = TypeVar("PipelineOrModel")

CONFIG_NAME = "linear_attention_config.json"
WEIGHTS_NAME = "linear_attention.safetensors"
FORMAT_VERSION = 1
PROCESSORS: dict[str, type[BaseProcessor]] = {
    "clear": ClearProcessor,
    "gla": GLAProcessor,
    "linear": LinearProcessor,
}


def save_linear_attention(pipe_or_model: Any, directory: str | Path) -> Path:
    """Save what was converted: the processors, their weights, and the layers' own weights where those changed.

    Writes `linear_attention_config.json` and `linear_attention.safetensors`, each atomically.

    Args:
        pipe_or_model: A converted pipeline or transformer.
        directory: Where to; made if it does not exist.

    Returns:
        The directory.

    Raises:
        ValueError: No layer is converted.
    """
    model = _single_transformer(pipe_or_model)
    converted = [(layer, layer.processor) for layer in layers_of(model) if layer.processor is not None]
    if not converted:
        raise ValueError("No attention layer is converted: linearize(pipe, processor) first.")
    layers: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    for layer, processor in converted:
        assert processor is not None
        processor.check_fused_loras(layer.attn)
        own, kept = processor.weights_of(layer.attn), processor.original_weights
        changed = sorted(name for name in kept if not torch.equal(own[name], kept[name].to(own[name])))
        layers[layer.name] = _describe(processor, changed)
        tensors |= _tensors(layer, processor, changed)
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base_model": _base_model(pipe_or_model, model),
        "transformer": type(model).__name__,
        "layers": layers,
    }
    directory = Path(directory)
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(directory / WEIGHTS_NAME, lambda path: save_file(contiguous, path, metadata={"format": "pt"}))
    write_json(directory / CONFIG_NAME, config)
    return directory


def load_linear_attention(
    pipe_or_model: PipelineOrModel, directory: str | Path, *, subfolder: str | None = None
) -> PipelineOrModel:
    """Convert a pipeline or transformer as a saved one was, and load its weights.

    Everything is checked before the model is touched: a call that fails leaves it as it was. Layers that are
    converted already are replaced. [`restore`] gives the original back.

    Args:
        pipe_or_model: A pipeline or transformer of the class that the weights were made for.
        directory: A folder written by [`save_linear_attention`].
        subfolder: A folder inside `directory`.

    Returns:
        `pipe_or_model` itself.

    Raises:
        ValueError: Weights for another model or processor, missing, unexpected or mis-shaped tensors, or files that
            cannot be read.
    """
    model = _single_transformer(pipe_or_model)
    folder = Path(directory, subfolder) if subfolder else Path(directory)
    config = _check_config(read_json(folder / CONFIG_NAME), model, folder)
    processors = {name: _read_processor(name, entry) for name, entry in config["layers"].items()}
    known = {layer.name for layer in layers_of(model)}
    unknown = sorted(set(processors) - known)
    if unknown:
        raise ValueError(
            f"{folder / CONFIG_NAME} converts layers that this {type(model).__name__} does not have: "
            f"{_list(unknown)}. It was made for a model with other depths; load it into the base model it names."
        )
    planned = plan(model, processors)
    expected: dict[str, torch.Tensor] = {}
    for layer, processor in planned:
        assert processor is not None
        expected |= _tensors(layer, processor, config["layers"][layer.name]["weights"])
        own = processor.weights_of(layer.attn)
        for name in config["layers"][layer.name]["weights"]:
            if is_quantized(own[name]):
                raise ValueError(
                    f"{layer.name}.{name} is quantized, and the file has another one in its place: load it into the "
                    "model as it was before quantization, then quantize."
                )
        if config["layers"][layer.name]["weights"] and fused_loras(layer.attn):
            raise ValueError(
                f"{layer.name} has a LoRA fused into its weights, which the loaded weights would replace: call "
                "unfuse_lora(), load, then fuse_lora() again."
            )
    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            _check_tensors(file, expected, path)
            loaded = {name: file.get_tensor(name) for name in expected}
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Save it again with save_linear_attention.") from error
    install(planned)
    with torch.no_grad():
        for layer, processor in planned:
            assert processor is not None
            names = config["layers"][layer.name]["weights"]
            processor.keep_original_weights(layer.attn, names)
            for name, tensor in _tensors(layer, processor, names).items():
                tensor.copy_(loaded[name])
            if names:
                fuse_again(layer.attn)
    return pipe_or_model


def _base_model(pipe_or_model: Any, model: Any) -> str | None:
    name = getattr(pipe_or_model, "name_or_path", None) or model.config.get("_name_or_path")
    # A folder of this machine means nothing to others.
    return str(name) if name and not Path(name).exists() else None


def _single_transformer(pipe_or_model: Any) -> Any:
    models = transformers_of(pipe_or_model)
    if len(models) > 1:
        raise ValueError(
            f"{type(pipe_or_model).__name__} has {len(models)} transformers: save and load them one at a time, such "
            "as save_linear_attention(pipe.transformer, directory)."
        )
    return models[0]


def _describe(processor: BaseProcessor, weights: list[str]) -> dict[str, Any]:
    kind = next((name for name, cls in PROCESSORS.items() if processor.plain_class is cls), None)
    if kind is None:
        raise ValueError(f"{type(processor).__name__} cannot be saved: only {', '.join(PROCESSORS)} have a format.")
    arguments = processor.to_config()
    del arguments["impl"]  # a matter of the machine, not of the weights
    return {"processor": kind, "arguments": arguments, "weights": weights}


def _tensors(layer: Layer, processor: BaseProcessor, weights: list[str]) -> dict[str, torch.Tensor]:
    """A layer's tensors under their names in the file: `<layer>.processor.<parameter>` and `<layer>.<weight>`."""
    own = processor.weights_of(layer.attn)
    missing = [name for name in weights if name not in own]
    if missing:
        raise ValueError(
            f"{layer.name} has no weight {_list(missing)}: the checkpoint is for another attention class."
        )
    tensors: dict[str, torch.Tensor] = {}
    tensors |= {f"{layer.name}.processor.{name}": tensor for name, tensor in processor.own_parameters().items()}
    return tensors | {f"{layer.name}.{name}": own[name] for name in weights}


def _check_config(config: Any, model: Any, folder: Path) -> dict[str, Any]:
    where = folder / CONFIG_NAME
    if not isinstance(config, dict) or not isinstance(config.get("layers"), dict) or not config["layers"]:
        raise ValueError(f"{where} does not describe converted layers: is it a folder of save_linear_attention?")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format_version {config.get('format_version')!r}, this version of diffusers_linattn reads "
            f"{FORMAT_VERSION}. It was saved by {config.get('library_version')!r}: use that version."
        )
    if config.get("transformer") != type(model).__name__:
        raise ValueError(
            f"{where} is for a {config.get('transformer')}, this model is a {type(model).__name__}. Load it into "
            f"{config.get('base_model') or 'the base model it was made from'}."
        )
    return config


def _read_processor(name: str, entry: Any) -> BaseProcessor:
    if not isinstance(entry, dict) or set(entry) != {"processor", "arguments", "weights"}:
        raise ValueError(f"{name}: expected the keys processor, arguments and weights, got {entry!r}.")
    cls = PROCESSORS.get(entry["processor"])
    if cls is None:
        raise ValueError(f"{name}: unknown processor {entry['processor']!r}, expected one of {', '.join(PROCESSORS)}.")
    weights = entry["weights"]
    if not isinstance(weights, list) or not all(isinstance(weight, str) for weight in weights):
        raise ValueError(f"{name}: weights must be a list of names, got {weights!r}.")
    if not isinstance(entry["arguments"], dict):
        raise ValueError(f"{name}: arguments must be an object, got {entry['arguments']!r}.")
    try:
        return cls.from_config(entry["arguments"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _check_tensors(file: Any, expected: dict[str, torch.Tensor], path: Path) -> None:
    present = set(file.keys())
    missing, extra = sorted(set(expected) - present), sorted(present - set(expected))
    if missing or extra:
        problems = [f"{kind} {_list(names)}" for kind, names in (("misses", missing), ("has extra", extra)) if names]
        raise ValueError(
            f"{path} {' and '.join(problems)}. It does not belong to its {CONFIG_NAME}, or to another processor."
        )
    for name, tensor in expected.items():
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(tensor.shape):
            raise ValueError(f"{path}: {name} has shape {shape}, this model needs {tuple(tensor.shape)}.")


def _list(names: list[str], most: int = 3) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
