"""Save linearized attention to a folder, and load it from a folder or the Hub into another copy of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffusers_linattn.files import as_read_back
from diffusers_linattn.linearize import (
    Layer,
    fuse_again,
    install,
    is_quantized,
    layers_of,
    plan,
    put_in,
    restore_layers,
    single_transformer_of,
)
from diffusers_linattn.lora import (
    LORA_NAME,
    add_lora,
    describe_lora,
    fused_loras,
    lora_shapes,
    lora_tensors,
    lora_to_save,
)
from diffusers_linattn.models import supported_class
from diffusers_linattn.offloading import check_offloading
from diffusers_linattn.processors import BaseProcessor, ClearProcessor
from diffusers_linattn.sharing.checkpoint import (
    MAX_OVERHEAD,
    WEIGHTS_NAME,
    Checkpoint,
    Shapes,
    list_some,
    open_checkpoint,
    write_checkpoint,
)
from diffusers_linattn.sharing.clear_layout import read_clear_layout
from diffusers_linattn.sharing.origin import base_model_of
from diffusers_linattn.sharing.saved_config import (
    CONFIG_NAME,
    PROCESSORS,
    SavedConfig,
    SavedLayer,
    check_metrics,
    check_readable,
)
from diffusers_linattn.sharing.sources import open_source
from diffusers_linattn.tracker import remove_tracker


PipelineOrModel = TypeVar("PipelineOrModel")
Planned = list[tuple[Layer, BaseProcessor]]

__all__ = ["CONFIG_NAME", "PROCESSORS", "WEIGHTS_NAME", "load_linear_attention", "save_linear_attention"]

# No file is read that is larger than all that could belong to the model: fp64, and as much again for processors.
BYTES_PER_PARAMETER = 16
_ONE_AT_A_TIME = "save and load them one at a time, such as save_linear_attention(pipe.transformer, directory)."
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_linear_attention(
    pipe_or_model: Any,
    directory: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Save what was converted: the processors, their weights, and the layers' own weights where those changed.

    Writes `linear_attention_config.json` and `linear_attention.safetensors`, as `docs/format.md` describes them. The
    same weights give the same bytes. All files are written beside the old ones first, so that a call that fails leaves
    the folder as it was. A LoRA that lies in converted layers only is saved as such.

    Args:
        pipe_or_model: A converted pipeline or transformer.
        directory: Where to; made if it does not exist.
        max_shard_size: Weights that are larger become several files with an index.
        variant: A word in the names of the weight files, such as `"fp16"`, as diffusers writes them.
        recipe: How the weights were trained, JSON-able; `None` is what [`distill`] or an earlier load left.
        metrics: Named results for the configuration and the model card, beside those that were left likewise.

    Returns:
        The directory.

    Raises:
        ValueError: No layer is converted, a LoRA that is fused or gone, weights that are offloaded, quantized or not
            finite, or a folder that holds another variant of other layers.

    Example:
        >>> save_linear_attention(pipe, "flux-clear-w16")  # doctest: +SKIP
    """
    model = single_transformer_of(pipe_or_model, _ONE_AT_A_TIME)
    converted = [(layer, layer.processor) for layer in layers_of(model) if layer.processor is not None]
    if not converted:
        raise ValueError("No attention layer is converted: linearize(pipe, processor) first.")
    lora_name = lora_to_save(model, [layer.attn for layer, _ in converted])
    layers: dict[str, SavedLayer] = {}
    tensors: dict[str, torch.Tensor] = {}
    for layer, processor in converted:
        processor.check_fused_loras(layer.attn)
        changed = _changed_weights(layer, processor)
        layers[layer.name] = SavedLayer(processor, tuple(changed), describe_lora(layer.attn, lora_name))
        tensors |= _parameters(layer, processor, changed, lora_name)
    _check_savable(tensors)
    provenance = _provenance([processor for _, processor in converted], recipe, metrics)
    base_model, revision = base_model_of(pipe_or_model)
    config = SavedConfig(
        transformer=supported_class(model),
        layers=layers,
        base_model=base_model,
        base_model_revision=revision,
        recipe=provenance["recipe"],
        metrics=provenance["metrics"],
    )
    check_readable(config)
    directory = Path(directory)
    write_checkpoint(directory, config, tensors, max_shard_size=max_shard_size, variant=variant)
    for _, processor in converted:
        processor.provenance = provenance
    return directory


def load_linear_attention(
    pipe_or_model: PipelineOrModel,
    repo_or_directory: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    weight_name: str | None = None,
    variant: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    processor: ClearProcessor | None = None,
) -> PipelineOrModel:
    """Convert a pipeline or transformer as a saved one was, and load its weights.

    Everything is checked before the model is touched, and a call that fails leaves it as it was. Afterwards the model
    is the saved one, whatever was converted before: layers that the file does not name are dense. [`restore`] gives
    the original back. Weights are read one at a time, straight into the model's dtype and device. A model on the meta
    device is converted and checked; it has no place for values.

    Args:
        pipe_or_model: A pipeline or transformer of the class that the weights were made for.
        repo_or_directory: A folder written by [`save_linear_attention`], or the id of a repository on the Hub.
        revision: Branch, tag or commit on the Hub. All files come from one commit.
        subfolder: A folder inside.
        weight_name: One safetensors file that holds everything, such as a file of `Huage001/CLEAR`, whose settings
            are read from its name.
        variant: A word in the names of the weight files, such as `"fp16"`.
        token: For private and gated repositories; `None` is the one of `hf auth login`, `False` none.
        cache_dir: Where downloads are kept.
        local_files_only: Use the cache alone.
        force_download: Download again what is in the cache.
        processor: The settings of a file of CLEAR whose name does not tell them.

    Returns:
        `pipe_or_model` itself.

    Raises:
        ValueError: Weights for another model or processor, missing, unexpected or mis-shaped tensors, files that
            cannot be read, or ([`HubError`], which is an OSError as well) that cannot be downloaded.

    Example:
        >>> load_linear_attention(pipe, "me/flux-clear-w16")  # doctest: +SKIP
        >>> load_linear_attention(pipe, "Huage001/CLEAR", weight_name="clear_local_16.safetensors")  # doctest: +SKIP
    """
    model = single_transformer_of(pipe_or_model, _ONE_AT_A_TIME)
    layers = layers_of(model)
    if processor is not None and (weight_name is None or not isinstance(processor, ClearProcessor)):
        raise ValueError("processor= takes the ClearProcessor of a file of CLEAR: it goes with weight_name=.")
    source = open_source(
        repo_or_directory,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    imported: list[SavedConfig] = []

    def import_layout(name: str, header: Any) -> Any:
        found = read_clear_layout(name, header, model, layers, processor)
        imported.extend(found[:1] if found else ())
        return found

    plans: list[_Plan] = []

    def expect(config: SavedConfig, where: str) -> Shapes:
        plans.append(_plan(model, layers, config, where))
        return plans[-1].shapes

    max_bytes = MAX_OVERHEAD + int(BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters()))
    checkpoint = open_checkpoint(
        source,
        variant=variant,
        weight_name=weight_name,
        max_bytes=max_bytes,
        import_layout=import_layout,
        expect=expect,
    )
    if processor is not None and not imported:
        raise ValueError(f"{checkpoint.where} tells the settings of {weight_name}: leave processor= out.")
    checkpoint.check_copies()
    planned, dense = plans[0].planned, plans[0].dense
    _check_values(planned, checkpoint)
    originals = {layer.name: layer.processor.original_weights for layer in layers if layer.processor is not None}
    with _as_before_on_failure(layers, model):
        install([*planned, *dense])
        _copy(planned, checkpoint, originals)
    return pipe_or_model


@dataclass(frozen=True)
class _Plan:
    """What will be installed, which converted layers become dense, and the shapes of the tensors that this takes."""

    planned: Planned
    dense: list[tuple[Layer, None]]
    shapes: dict[str, tuple[int, ...]]


def _plan(model: Any, layers: list[Layer], config: SavedConfig, where: str) -> _Plan:
    """A configuration as changes of a model that fits it."""
    if config.transformer != supported_class(model):
        raise ValueError(
            f"{where} is for a {config.transformer}, this model is a {type(model).__name__}. Load it into "
            f"{config.base_model or 'the base model it was made from'}."
        )
    unknown = sorted(set(config.layers) - {layer.name for layer in layers})
    if unknown:
        raise ValueError(
            f"{where} converts layers that this {type(model).__name__} does not have: {list_some(unknown)}. It was "
            "made for a model with other depths; load it into the base model it names."
        )
    planned = [
        (layer, built)
        for layer, built in plan(model, {name: saved.processor for name, saved in config.layers.items()})
        if built is not None
    ]
    dense = [(layer, None) for layer in layers if layer.processor is not None and layer.name not in config.layers]
    expected: dict[str, tuple[int, ...]] = {}
    for layer, processor in planned:
        try:
            expected |= _shapes(layer, processor, config.layers[layer.name])
        except ValueError as error:
            raise ValueError(f"{where}: {layer.name}: {error}") from error
    check_offloading(model)
    return _Plan(planned, dense, expected)


def _shapes(layer: Layer, processor: BaseProcessor, saved: SavedLayer) -> dict[str, tuple[int, ...]]:
    own = processor.weights_of(layer.attn)
    if missing := [name for name in saved.weights if name not in own]:
        raise ValueError(f"it has no weight {list_some(missing)}: the checkpoint is for another attention class.")
    if saved.weights and fused_loras(layer.attn):
        raise ValueError(
            "it has a LoRA fused into its weights, which the loaded weights would replace: call unfuse_lora(), load, "
            "then fuse_lora() again."
        )
    for name in saved.weights:
        if is_quantized(own[name]):
            raise ValueError(
                f"its {name} is quantized or split over devices, and the file has another one in its place: load it "
                "into the model as it was before, or exclude the attention layers from quantization."
            )
    shapes = {f"processor.{name}": tuple(parameter.shape) for name, parameter in processor.own_parameters().items()}
    shapes |= {name: tuple(own[name].shape) for name in saved.weights} | lora_shapes(layer.attn, saved.lora)
    return {f"{layer.name}.{name}": shape for name, shape in shapes.items()}


def _check_values(planned: Planned, checkpoint: Checkpoint) -> None:
    """No NaN and no infinity, in the dtype that the model will hold the values in."""
    with checkpoint.reader() as read:
        for layer, _ in planned:
            dtype = next((p.dtype for p in layer.attn.parameters() if p.dtype in FLOATS), torch.float32)
            if any(p.is_meta for p in layer.attn.parameters()):
                continue
            prefix = f"{layer.name}."
            for name in [name for name in checkpoint.tensors if name.startswith(prefix)]:
                if not torch.isfinite(read(name).to(dtype)).all():
                    raise ValueError(
                        f"{checkpoint.tensors[name].path}: {name} holds values that are NaN or infinite in {dtype}. "
                        "The weights are damaged, or too large for this dtype."
                    )


def _copy(planned: Planned, checkpoint: Checkpoint, originals: Mapping[str, dict[str, torch.Tensor]]) -> None:
    """Fill what has been installed; `originals` are the original weights that the former processors kept, by layer."""
    config = checkpoint.config
    add_lora(
        planned[0][0].model,
        {f"{name}.{place}": lora for name, saved in config.layers.items() for place, lora in saved.lora.items()},
    )
    provenance = {"recipe": config.recipe, "metrics": dict(config.metrics)}
    with torch.no_grad(), checkpoint.reader() as read:
        for layer, processor in planned:
            processor.provenance = provenance
            saved = config.layers[layer.name]
            kept = originals.get(layer.name, {})  # not copied a second time
            processor.original_weights |= {name: kept[name] for name in saved.weights if name in kept}
            processor.keep_original_weights(layer.attn, saved.weights)
            name = LORA_NAME if saved.lora else None
            processor.lora = tuple(saved.lora)
            for key, parameter in _parameters(layer, processor, saved.weights, name).items():
                if not parameter.is_meta:
                    parameter.copy_(read(key))
            if saved.weights:
                fuse_again(layer.attn)


@contextmanager
def _as_before_on_failure(layers: list[Layer], model: nn.Module) -> Iterator[None]:
    """Whatever fails within this context leaves the layers as they were before it."""
    # A dense layer comes back by `restore_layers`. What a converted one holds would be lost: it waits on the CPU.
    before = []
    for layer in layers:
        processor = layer.processor
        if processor is not None:
            processor.check_fused_loras(layer.attn)  # they can be put back
            name = LORA_NAME if describe_lora(layer.attn, LORA_NAME) else None
            held = _parameters(layer, processor, processor.original_weights, name)
            values = {key: p.detach().to("cpu", copy=True) for key, p in held.items() if not p.is_meta}
            before.append((layer, processor, name, describe_lora(layer.attn, name), values))
    try:
        yield
    except BaseException:
        restore_layers(layers)
        add_lora(model, {f"{layer.name}.{place}": low for layer, *_, lora, _ in before for place, low in lora.items()})
        for layer, processor, name, _, values in before:
            put_in(layer.attn, processor)
            with torch.no_grad():
                for key, parameter in _parameters(layer, processor, processor.original_weights, name).items():
                    if key in values:
                        parameter.copy_(values[key])
        if not before:
            remove_tracker(model)
        raise


def _parameters(
    layer: Layer, processor: BaseProcessor, weights: Iterable[str], lora_name: str | None
) -> dict[str, nn.Parameter]:
    """A layer's parameters under their names in the format: of its processor, its own weights, its LoRA."""
    own = processor.weights_of(layer.attn)
    named = {f"processor.{name}": parameter for name, parameter in processor.own_parameters().items()}
    named |= {name: own[name] for name in weights} | lora_tensors(layer.attn, lora_name)
    return {f"{layer.name}.{name}": parameter for name, parameter in named.items()}


_OFFLOADED = "{} is offloaded weight by weight and cannot be read: call pipe.remove_all_hooks() first."


def _changed_weights(layer: Layer, processor: BaseProcessor) -> list[str]:
    own, kept = processor.weights_of(layer.attn), processor.original_weights
    for name in kept:
        if own[name].is_meta:
            raise ValueError(_OFFLOADED.format(f"{layer.name}.{name}"))
    return sorted(name for name, weight in kept.items() if not torch.equal(own[name], weight.to(own[name])))


def _check_savable(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(_OFFLOADED.format(name))
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {tensor.dtype}, which the format does not have: save it in bf16.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values: the training diverged, there is nothing to save.")


def _provenance(
    processors: list[BaseProcessor], recipe: Mapping[str, Any] | None, metrics: Mapping[str, float] | None
) -> dict[str, Any]:
    """How the weights came about: as given, else as the processors were left, if they were left alike."""
    first = processors[0].provenance
    known = first if first and all(processor.provenance == first for processor in processors) else {}
    if recipe is not None:  # trained anew
        known = {}
    kept = {"recipe": recipe or known.get("recipe"), "metrics": {**known.get("metrics", {}), **(metrics or {})}}
    kept = as_read_back(kept, "recipe and metrics must be JSON-able")
    check_metrics(kept["metrics"], "save_linear_attention")
    return kept
