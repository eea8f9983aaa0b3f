"""Put processors into a pipeline or model, say what is in it, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from diffusers_linattn.layer_selection import Layers, match_pattern, select_layers
from diffusers_linattn.lora import lora_switched_off, remove_lora
from diffusers_linattn.models import Family, find_family, unsupported_message
from diffusers_linattn.models.projections import PROJECTIONS
from diffusers_linattn.offloading import check_offloading, offload_again
from diffusers_linattn.processors.base import HOST_ATTRIBUTES, BaseProcessor, RandomInit
from diffusers_linattn.tracker import check_not_parallel, find_tracker, install_tracker, remove_tracker


PipelineOrModel = TypeVar("PipelineOrModel")


@dataclass(frozen=True)
class Layer:
    """One attention layer that can be converted.

    Args:
        name: Its module name in the transformer, such as `"transformer_blocks.0.attn"`.
        attn: The attention module.
        scope: Under which name the layouts of its tokens are found: `"joint"`, `"image"` or another of the family's.
        index: Its place among the layers of its transformer that can be converted.
        model: The transformer.
        family: What is known of that transformer.
    """

    name: str
    attn: Any
    scope: str
    index: int
    model: nn.Module
    family: Family

    @property
    def processor(self) -> BaseProcessor | None:
        """The processor of this library in the layer, `None` while it is dense."""
        processor = self.attn.processor
        return processor if isinstance(processor, BaseProcessor) else None


def transformers_of(pipe_or_model: Any) -> list[nn.Module]:
    """The supported transformers of a pipeline, or the model itself.

    Raises:
        ValueError: There is none; the message lists what is supported.
    """
    if isinstance(pipe_or_model, nn.Module):
        model = getattr(pipe_or_model, "_orig_mod", pipe_or_model)  # torch.compile wraps the module
        if find_family(model) is None:
            name = type(model).__name__
            if not hasattr(model, "config") and any(hasattr(part, "processor") for part in model.modules()):
                raise ValueError(f"{name} is a part of a transformer: give the whole transformer, or the pipeline.")
            raise ValueError(
                unsupported_message(f"{name} is not a transformer that diffusers_linattn knows.", type(model))
            )
        return [model]
    components = getattr(pipe_or_model, "components", None)
    if not isinstance(components, Mapping):
        raise ValueError(f"Expected a diffusers pipeline or a transformer, got {type(pipe_or_model).__name__}.")
    modules = [getattr(part, "_orig_mod", part) for part in components.values() if isinstance(part, nn.Module)]
    models = [module for module in dict.fromkeys(modules) if find_family(module) is not None]
    if not models:
        held = ", ".join(type(module).__name__ for module in modules) or "no module"
        found = f"{type(pipe_or_model).__name__} (which holds {held})"
        raise ValueError(
            unsupported_message(f"{found} has no transformer that diffusers_linattn knows.", *map(type, modules))
        )
    return models


def single_transformer_of(pipe_or_model: Any, remedy: str) -> Any:
    """The one supported transformer of a pipeline; an error that ends in `remedy` if there are more."""
    models = transformers_of(pipe_or_model)
    if len(models) > 1:
        raise ValueError(f"{type(pipe_or_model).__name__} has {len(models)} transformers: {remedy}")
    return models[0]


def layers_of(pipe_or_model: Any) -> list[Layer]:
    """Every attention layer that can be converted, dense or not, in the order of the forward pass."""
    layers = []
    for model in transformers_of(pipe_or_model):
        family = find_family(model)
        assert family is not None
        scopes = family.scopes(model)
        named = [
            (name, module, scopes.get(name, scope))
            for name, module in model.named_modules()
            for pattern, scope in family.layers.items()
            if fnmatchcase(name, pattern) and hasattr(module, "processor")
        ]
        layers += [Layer(name, attn, scope, i, model, family) for i, (name, attn, scope) in enumerate(named)]
    return layers


def linearize(
    pipe_or_model: PipelineOrModel,
    processor_or_mapping: BaseProcessor | Mapping[str, BaseProcessor | None],
    *,
    layers: Layers | None = None,
) -> PipelineOrModel:
    """Give attention layers of a pipeline or transformer linear cost; no training, the weights stay.

    Each layer gets a copy of its own. Of the layers that this call selects, those converted already go back to their
    original state first, so that converting twice is the same as converting once. Layers that it does not select keep
    what they have: `restore(pipe)` first to start over. Nothing changes if the call fails.

    Args:
        pipe_or_model: A diffusers pipeline or a transformer; see `docs/models.md` for those supported.
        processor_or_mapping ([`BaseProcessor`] or `dict`): A processor for all layers, or processors by layer-name
            pattern (`*` matches anything); where patterns overlap the later one wins, and `None` makes a layer dense.
        layers (*optional*): Convert only these: a name pattern, an index, a list of them, or a function of the name.

    Returns:
        `pipe_or_model` itself.

    Raises:
        ValueError: No supported transformer, a pattern that matches or decides nothing, an index out of range, or a
            processor that does not fit a layer.

    Example:
        >>> from diffusers import PixArtTransformer2DModel
        >>> from diffusers_linattn import ClearProcessor, linearize
        >>> model = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4,
        ...     num_layers=2, cross_attention_dim=16, caption_channels=16, sample_size=8)
        >>> _ = linearize(model, {"transformer_blocks.0.*": ClearProcessor(window=4)})
    """
    install(plan(pipe_or_model, processor_or_mapping, layers))
    return pipe_or_model


def restore(pipe_or_model: PipelineOrModel) -> PipelineOrModel:
    """Give a pipeline or transformer its original attention back, weights included.

    Weights of converted layers return to what they were before [`distill`], [`load_linear_attention`],
    `load_state_dict` or any training with gradients changed them. What else is written into them stays. Restoring what
    was not converted does nothing.

    Raises:
        ValueError: LoRAs are fused into the layers that were not before; nothing has changed then.

    Example:
        >>> pipe = restore(pipe)  # doctest: +SKIP
    """
    layers = layers_of(pipe_or_model)
    restore_layers(layers)
    for model in {id(layer.model): layer.model for layer in layers}.values():
        remove_tracker(model)
    return pipe_or_model


def plan(
    pipe_or_model: Any,
    processor_or_mapping: BaseProcessor | Mapping[str, BaseProcessor | None],
    layers: Layers | None = None,
) -> list[tuple[Layer, BaseProcessor | None]]:
    """Decide and build what [`install`] will put where, without touching the model."""
    candidates = layers_of(pipe_or_model)
    names = [layer.name for layer in candidates]
    selected = set(range(len(names))) if layers is None else select_layers(names, layers)
    mapping = processor_or_mapping
    if isinstance(mapping, BaseProcessor):
        chosen: dict[int, tuple[str, BaseProcessor | None]] = dict.fromkeys(selected, ("*", mapping))
    elif isinstance(mapping, Mapping):
        chosen = {}
        for pattern, processor in mapping.items():
            if not isinstance(processor, BaseProcessor | None):
                raise ValueError(f"The mapping's {pattern!r}: {not_a_processor(processor)}")
            chosen |= {i: (pattern, processor) for i in match_pattern(names, pattern) if i in selected}
        for pattern in mapping:
            if not any(pattern == used for used, _ in chosen.values()):
                raise ValueError(
                    f"The pattern {pattern!r} decides nothing: every layer it matches is excluded by layers= or "
                    "overridden by a later pattern."
                )
    else:
        raise ValueError(not_a_processor(mapping))
    if not chosen:
        raise ValueError("No layer is selected: layers= or the mapping is empty.")
    planned = [(candidates[i], _build(candidates[i], chosen[i][1])) for i in sorted(chosen)]
    with_weights = [layer.model for layer, built in planned if built is not None and built.own_parameters()]
    for model in {id(model): model for model in with_weights}.values():
        check_offloading(model)
    return planned


def not_a_processor(given: Any) -> str:
    """What to say of something that stands in the place of a processor."""
    if isinstance(given, type):
        return f"Got the class {given.__name__}: give an instance of it, {given.__name__}(...)."
    return (
        f"Got a {type(given).__name__}: expected a processor such as ClearProcessor(window=16), or a dict from "
        "layer-name patterns to processors or None."
    )


def _build(layer: Layer, template: BaseProcessor | None) -> BaseProcessor | None:
    if template is None:
        return None
    check_not_parallel(layer.model)
    current = layer.processor
    original = layer.attn.processor if current is None else current.original
    try:
        built = template.copy_for_layer(layer.attn, original, index=layer.index, scope=layer.scope)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from error
    if template.reset_projections:
        if _submodule(layer.attn, "to_qkv_mlp_proj") is not None:
            raise ValueError(
                f"{layer.name}: reset_projections would reset the MLP as well, which shares its weights with the "
                "attention here. Keep the projections in this layer."
            )
        for name in PROJECTIONS:
            projection = _submodule(layer.attn, name)
            # A list, to_out, holds a projection of its own; an identity leaves the projection to another module.
            if isinstance(projection, nn.ModuleList | nn.Identity):
                continue
            if projection is None:
                continue
            quantized = isinstance(projection, nn.Linear) and is_quantized(projection.weight)
            if quantized or not isinstance(projection, nn.Linear):
                raise ValueError(
                    f"{layer.name}: reset_projections needs plain linear projections, {name} is a "
                    f"{'quantized ' if quantized else ''}{type(projection).__name__}."
                )
    return built


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is not the plain tensor of numbers that another one can be copied into."""
    return not weight.is_floating_point() or type(weight.data) is not torch.Tensor


def install(planned: list[tuple[Layer, BaseProcessor | None]]) -> None:
    """Put planned processors into their layers."""
    restore_layers(layer for layer, _ in planned)
    for layer, processor in planned:
        if processor is None:
            continue
        processor.tracker = install_tracker(layer.model, layer.family)
        put_in(layer.attn, processor)
        if processor.reset_projections:
            _reset_projections(layer, processor)
    for model in {id(layer.model): layer.model for layer, _ in planned}.values():
        names = tuple(layer.name for layer in layers_of(model) if layer.processor)
        tracker = find_tracker(model)
        if tracker is not None:
            tracker.watch(names)
        if not names:
            remove_tracker(model)
        offload_again(model)


def restore_layers(layers: Iterable[Layer]) -> None:
    """Give layers their original processors and weights back: all of them, or none and an error."""
    converted = [(layer, layer.processor) for layer in layers if layer.processor is not None]
    for layer, processor in converted:
        processor.check_fused_loras(layer.attn)
    for layer, processor in converted:
        processor.lora = remove_lora(layer.model, layer.attn) or processor.lora
        own = processor.weights_of(layer.attn)
        # Projections that are fused by now are made again from the restored ones.
        kept = {name: w for name, w in processor.original_weights.items() if name in own or not name.startswith(FUSED)}
        changed = [(own[name], weight) for name, weight in kept.items()]
        with torch.no_grad():
            for parameter, weight in changed:
                parameter.copy_(weight)
        if changed:
            fuse_again(layer.attn)
        for name in HOST_ATTRIBUTES:
            if hasattr(processor.original, name):
                setattr(processor.original, name, getattr(processor, name))
        set_processor(layer.attn, processor.original)
        hooks: Any = layer.attn._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is keep_before_loading]:
            del hooks[key]


def put_in(attn: Any, processor: BaseProcessor) -> None:
    """Put a processor of this library into an attention module that has none."""
    set_processor(attn, processor)
    attn.register_load_state_dict_pre_hook(keep_before_loading)


def keep_before_loading(attn: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before `load_state_dict` writes into a converted layer: keep the weights that it will change."""
    processor: Any = attn.processor
    if not isinstance(processor, BaseProcessor):
        return
    names = {parameter: name for name, parameter in processor.weights_of(attn).items()}
    changed = []
    for key, parameter in attn.named_parameters():
        value = state_dict.get(prefix + key)
        if parameter in names and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            if not parameter.is_meta and not torch.equal(value.to(parameter), parameter):
                changed.append(names[parameter])
    processor.keep_original_weights(attn, changed)


@contextmanager
def original_attention(pipe_or_model: Any) -> Iterator[None]:
    """Within this context the model is its own teacher: original processors and weights, switched in without a copy.

    Example:
        >>> with original_attention(pipe):  # doctest: +SKIP
        ...     image = pipe("a cat").images[0]
    """
    converted = [(layer, layer.processor) for layer in layers_of(pipe_or_model) if layer.processor is not None]
    switched: list[tuple[nn.Parameter, torch.Tensor]] = []
    found = (find_tracker(model) for model in transformers_of(pipe_or_model))
    trackers = [(tracker, tracker.installed) for tracker in found if tracker is not None]
    try:
        for tracker, _ in trackers:
            tracker.installed = ()
        for layer, processor in converted:
            processor.check_fused_loras(layer.attn)
            own = processor.weights_of(layer.attn)
            kept = processor.original_weights
            if kept and getattr(layer.attn, "fused_projections", False) and "to_qkv.weight" not in kept:
                raise ValueError(
                    f"{layer.name}: its projections are fused, so that its original weights cannot be switched in. "
                    "Call unfuse_qkv_projections() on the model first."
                )
            for name, weight in processor.original_weights.items():
                if own[name].is_meta:
                    raise ValueError(
                        f"{layer.name}: the model is offloaded weight by weight, so that its original weights cannot "
                        "be switched in. Remove the offloading hooks first (pipe.remove_all_hooks())."
                    )
                switched.append((own[name], own[name].data))
                own[name].data = weight.to(own[name].device)
            set_processor(layer.attn, processor.original)
        with lora_switched_off(layer.attn for layer, _ in converted):
            yield
    finally:
        for parameter, data in switched:
            parameter.data = data
        for layer, processor in converted:
            layer.attn.processor = processor
        for tracker, names in trackers:
            tracker.installed = names


# Projections that `fuse_qkv_projections` adds.
FUSED = ("to_qkv.", "to_kv.", "to_added_qkv.")


def fuse_again(attn: Any) -> None:
    """Where `fuse_qkv_projections` was called: make the fused projections again from the single ones."""
    if getattr(attn, "fused_projections", False):
        attn.fused_projections = False
        attn.fuse_projections()


def set_processor(attn: Any, processor: Any) -> None:
    """Put any processor into an attention module, whether or not the class has a method for it."""
    attn._modules.pop("processor", None)  # a plain object cannot take the place of a registered module
    attn.processor = processor


def _reset_projections(layer: Layer, processor: BaseProcessor) -> None:
    linears = {name: m for name in PROJECTIONS if isinstance(m := _submodule(layer.attn, name), nn.Linear)}
    weights = [f"{name}.{weight}" for name, module in linears.items() for weight, _ in module.named_parameters()]
    processor.keep_original_weights(layer.attn, weights)
    random_init = RandomInit(seed=layer.index)
    for module in linears.values():
        if module.weight.is_meta:  # no values, and to draw some would take seconds
            continue
        with random_init:
            fresh = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(fresh.get_parameter(name))
    fuse_again(layer.attn)


def _submodule(attn: nn.Module, name: str) -> Any:
    try:
        return attn.get_submodule(name)
    except AttributeError:
        return None
