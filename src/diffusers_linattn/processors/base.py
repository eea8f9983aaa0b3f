"""The processor that answers the attention call of a layer's own processor."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import nn
from torch.overrides import TorchFunctionMode

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.lora import check_fused, fused_loras
from diffusers_linattn.models.projections import QUERY_PROJECTIONS
from diffusers_linattn.ops.checks import check_choice
from diffusers_linattn.processors.attention_call import AnswerAttention, AttentionCall, alike
from diffusers_linattn.processors.stock_call import attention_only, call_stock
from diffusers_linattn.tracker import CONTEXT_PARALLELISM, LayoutTracker


# Set by diffusers on every processor (`set_attention_backend`, `enable_parallelism`): they move with the place.
HOST_ATTRIBUTES = ("_attention_backend", "_parallel_config")

Processor = TypeVar("Processor", bound="BaseProcessor")


class BaseProcessor(nn.Module):
    """Holds the stock processor of one attention layer, runs it, and answers its attention call.

    Projections, norms, rotary embeddings, text/image concatenation, LoRA and fused projections stay the model's own
    code. Subclasses say how the call is answered ([`attend`]) and which weights that takes ([`build`]). Their
    constructor arguments are the whole configuration, kept as attributes of the same names.

    A processor made by a user is a *template*: [`linearize`] gives each layer its own copy.
    """

    # HOST_ATTRIBUTES, which diffusers looks for on every processor.
    _attention_backend = None
    _parallel_config = None

    reset_projections: bool
    impl: str | None
    impls: tuple[str, ...] = ()
    argument_names: tuple[str, ...] = ()
    plain_class: type[Any]
    # How its weights came about, for those who save them: {"recipe": ..., "metrics": ...}.
    provenance: dict[str, Any] | None = None
    stock: Any
    _stock_kind: Any
    _attention_only: Callable[..., Any] | None = None

    def __init_subclass__(cls) -> None:
        cls.plain_class = vars(cls).get("plain_class", cls)

    def __init__(self, *, reset_projections: bool, impl: str | None) -> None:
        nn.Module.__init__(self)  # not super(): the class of an installed processor may have a stock class as a base
        if not isinstance(reset_projections, bool):
            raise ValueError(f"reset_projections must be True or False, got {reset_projections!r}.")
        check_choice("impl", impl, (None, *self.impls))
        self.reset_projections = reset_projections
        self.impl = impl
        self.original: Any = None
        self.__dict__["stock"] = None
        self.tracker: LayoutTracker | None = None
        self.scope = "joint"
        self.original_weights: dict[str, torch.Tensor] = {}
        self.fused_loras: frozenset[tuple[str, str]] = frozenset()
        self.lora: tuple[str, ...] = ()  # the modules of its layer that a LoRA trained with it is beside

    def to_config(self) -> dict[str, Any]:
        """The constructor arguments, JSON-able; `type(processor).from_config` takes them back."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @classmethod
    def from_config(cls: type[Processor], config: dict[str, Any]) -> Processor:
        """A processor from [`to_config`].

        Raises:
            ValueError: A key that is no constructor argument, or a value that the constructor refuses.
        """
        known = inspect.signature(cls).parameters
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no argument {', '.join(map(repr, unknown))}: expected {', '.join(known)}. A "
                "configuration saved by a newer diffusers_linattn needs that version."
            )
        return cls(**config)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class of an installed processor is made at run time, so that pickle cannot find it by name.
        if type(self) is self.plain_class:
            return super().__reduce_ex__(protocol)
        return _new_signed, (self.plain_class, self._stock_kind), self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.to_config().items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    @property
    def scale(self) -> Any:
        """The strength of the IP-Adapter in the stock processor, which pipelines set on the layer's processor."""
        return self.original.scale

    @scale.setter
    def scale(self, value: Any) -> None:
        for held in (self.original, self.stock):
            held.scale = value

    @property
    def is_template(self) -> bool:
        """Whether this processor belongs to no layer yet."""
        return self.tracker is None

    def build(self, heads: int, head_dim: int, channels: int, index: int) -> None:
        """Create the weights for a layer of that size; `index` is its place among those that can be converted.

        Weights go into leaf modules that are called, never into a bare parameter of the processor: offloading would
        leave such a parameter on the wrong device.
        """

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Answer one attention call: `(batch, heads, tokens, head_dim)`, the query's dtype."""
        raise TypeError(f"{type(self).__name__} does not say how it attends: it must define attend().")

    @property
    def changes_input(self) -> bool:
        """Whether [`prepare`] has to be called."""
        return False

    def prepare(self, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Change the input of the layer before its projections; the default leaves it alone."""
        return hidden_states

    def implementation(self, layout: TokenLayout | None, query: torch.Tensor) -> str:
        """Which implementation answers a call over `layout`, in words for `status`.

        Args:
            layout: Of the latest call, `None` before the first.
            query: Like that of a call, but of one token: (1, heads, 1, head_dim). Its numbers are not read.
        """
        return self.impl or self.impls[0]

    def copy_for_layer(self: Processor, attn: nn.Module, original: Any, *, index: int, scope: str) -> Processor:
        """A fresh processor with this configuration for the layer `attn`, whose processor `original` it will hold.

        It is not installed yet: that also takes a place in the layer and the model's tracker.
        """
        stock_kind = original if inspect.isfunction(original) else type(original)
        processor = _signed_class(self.plain_class, stock_kind).from_config(self.to_config())
        weight = _weight_like_those_of(attn)
        # On the meta device there are no values, and to draw some would take seconds.
        values = contextlib.nullcontext() if weight.is_meta else RandomInit(seed=index)
        with torch.device("meta" if weight.is_meta else "cpu"), values:
            processor.build(*attention_size(attn), index=index)
        offloaded = weight.is_meta and any(hasattr(module, "_hf_hook") for module in attn.modules())
        if offloaded and (processor.own_parameters() or processor.reset_projections):
            raise ValueError(
                "the model is offloaded weight by weight, and new weights would not be: convert it before "
                "enable_sequential_cpu_offload(), and load it without a device_map that offloads."
            )
        processor.to(device=weight.device, dtype=weight.dtype)
        processor.original = original
        # Not through Module.__setattr__: a stock processor with weights must be registered once, as `original`.
        processor.__dict__["stock"] = _with_native_attention(original)
        processor.scope = scope
        for name in HOST_ATTRIBUTES:
            if hasattr(original, name):
                setattr(processor, name, getattr(original, name))
        return processor

    def forward(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the stock processor of the layer with its attention call answered by [`attend`]."""
        if self.tracker is None:
            raise ValueError(
                f"This {type(self).__name__} is a template: give it to linearize(pipe, processor) or "
                "pipe.set_attn_processor(processor), which install a copy in each layer."
            )
        if self._parallel_config is not None:
            raise NotImplementedError(CONTEXT_PARALLELISM)
        layouts = self.tracker.layouts_of(self.scope)
        names = self.argument_names
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden_states = arguments["hidden_states"]
        behind = _grid_tokens_behind(arguments, layouts)
        if behind is not None:
            hidden_states = torch.cat([hidden_states, behind], 1)
        if self.changes_input:
            hidden_states = self._prepare(hidden_states, layouts)
            arguments["hidden_states"] = hidden_states
            if behind is not None:
                sizes = [hidden_states.shape[1] - behind.shape[1], behind.shape[1]]
                arguments["hidden_states"], arguments["encoder_hidden_states"] = hidden_states.split(sizes, 1)
        extra = args[len(names) :]
        passed: list[tuple[int, int]] = []
        answered: list[bool] = []
        # Arguments beyond the named ones are only possible behind a *args, and then all must stay positional.
        positional, named = (args, kwargs) if extra else ((), arguments)
        mode = AnswerAttention(self.attend, self.scope, layouts, hidden_states, answered, passed)
        if self._attention_only is None or torch.compiler.is_compiling():
            with mode:
                output = self.stock(attn, *positional, **named)
        else:
            bound = () if inspect.isfunction(self.stock) else (self.stock,)
            output = call_stock(self._attention_only, mode, *bound, attn, *positional, **named)
        if not answered and not any(arguments.get(name) for name in self.tracker.family.skipping):
            expected = " or ".join(f"{layout.length} query and key tokens ({layout})" for layout in layouts)
            raise ValueError(
                f"The tokens do not match the layout: {type(self).__name__} expected {expected}, but the layer "
                f"attended over {passed}. restore(model) gives the original attention back."
            )
        return output

    def _prepare(self, hidden_states: torch.Tensor, layouts: tuple[TokenLayout, ...]) -> torch.Tensor:
        if any(segment.kind == "memory" for segment in layouts[0].segments):
            raise ValueError(
                f"{type(self).__name__} was asked to change the input of a layer that keeps references in a cache: "
                "the input has them at the first step only. Use input_conv=False, or the pipeline without the cache."
            )
        if len(layouts) == 1:
            return self.prepare(hidden_states, layouts[0])
        prepared = hidden_states.clone()
        for samples, layout in alike(layouts):
            prepared[samples, : layout.length] = self.prepare(hidden_states[samples, : layout.length], layout)
        return prepared

    def keep_original_weights(self, attn: nn.Module, names: Iterable[str]) -> None:
        """Keep a copy of weights of the layer before they change, for `restore`. Kept once; later calls add names."""
        names = list(names)
        if names:
            self.check_fused_loras(attn)
        weights = self.weights_of(attn)
        for name in names:
            if not self.original_weights:
                self.fused_loras = fused_loras(attn)
            if name not in self.original_weights and not weights[name].is_meta:
                self.original_weights[name] = weights[name].detach().clone()

    def check_fused_loras(self, attn: nn.Module) -> None:
        """Raise if what is fused into the layer keeps its original weights from being put back."""
        check_fused(attn, self.fused_loras if self.original_weights else None)

    @staticmethod
    def weights_of(attn: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of a layer without those of its processor, under the names they have without a LoRA."""
        return _without_lora(attn, but="processor.")

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that this processor adds to the model, without those of a stock processor it holds.

        Like those of the layer under the names they have without a LoRA, which may be put beside them as well.
        """
        return _without_lora(self, but="original.")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # The kept weights follow the model to another device or dtype.
        super()._apply(fn, recurse)
        self.original_weights = {name: fn(weight) for name, weight in self.original_weights.items()}
        return self


def _make_signed_class(cls: type[BaseProcessor], stock_kind: Any) -> Any:
    """`cls` with the call signature of a stock processor: of a class of them, or of a plain function.

    Attention classes of diffusers pass on only those arguments whose names stand in the signature of
    `processor.__call__`. It has to be a class, shared by all layers with that stock processor: with a signature on
    each instance, `torch.compile` would compile every block anew.
    """
    stock_call = stock_kind if inspect.isfunction(stock_kind) else stock_kind.__call__
    parameters = list(inspect.signature(stock_call).parameters.values())
    if next(iter(parameters)).name != "self":  # a plain function
        parameters.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD))

    def __call__(self: BaseProcessor, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    __call__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in parameters if p.kind in named)[2:]  # without self and attn
    only = attention_only(stock_call)
    body = {
        "__call__": __call__,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "argument_names": names,
        "plain_class": cls,
        "_stock_kind": staticmethod(stock_kind) if inspect.isfunction(stock_kind) else stock_kind,
        "_attention_only": staticmethod(only) if only is not None else None,
    }
    # Pipelines find the processors of an IP-Adapter, which are modules, with isinstance.
    has_weights = isinstance(stock_kind, type) and issubclass(stock_kind, nn.Module)
    signed = type(cls.__name__, (cls, stock_kind) if has_weights else (cls,), body)
    try:
        # How diffusers skips this attention layer in its guiders depends on the stock processor alone.
        AttentionProcessorRegistry.register(signed, AttentionProcessorRegistry.get(stock_kind))
    except ValueError:
        pass  # the stock processor cannot be skipped either
    return signed


_signed_class: Callable[[Any, Any], Any] = functools.cache(_make_signed_class)


def _new_signed(cls: type[BaseProcessor], stock_kind: Any) -> BaseProcessor:
    signed = _signed_class(cls, stock_kind)
    return signed.__new__(signed)


def _without_lora(module: nn.Module, but: str) -> dict[str, nn.Parameter]:
    """The parameters of a module, except those whose names begin with `but`, under the names without a LoRA."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in module.named_parameters()
        if not name.startswith(but) and ".lora_" not in name
    }


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _weight_like_those_of(attn: nn.Module) -> torch.Tensor:
    """A weight with the device and dtype that new weights of a layer have to have."""
    weights = list(attn.parameters())
    weight = next((weight for weight in weights if weight.dtype in _DTYPES), None)
    if weight is not None:
        return weight
    # All are stored in another form: layerwise casting says what it computes in, other quantization does not.
    dtype = get_parameter_dtype(attn) if weights else torch.float32
    return torch.empty(0, device=weights[0].device if weights else None, dtype=dtype if dtype in _DTYPES else None)


class RandomInit(TorchFunctionMode):
    """Initial values come from a generator of their own: they neither read nor move the global random state, which
    belongs to the user and to all threads."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "generator" in kwargs or getattr(func, "__name__", None) in ("uniform_", "normal_", "rand", "randn"):
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def query_projection(attn: Any) -> Any:
    """The linear layer that makes the queries (perhaps keys and values as well) of a diffusers attention module."""
    for name in QUERY_PROJECTIONS:
        projection = getattr(attn, name, None)
        if projection is not None:
            return projection
    raise ValueError(
        f"{type(attn).__name__} has no query projection under a known name ({', '.join(QUERY_PROJECTIONS)})."
    )


def attention_size(attn: Any) -> tuple[int, int, int]:
    """`(heads, head_dim, channels)` of a diffusers attention module; channels is the width of its input."""
    projection = query_projection(attn)
    heads = next(getattr(attn, name) for name in ("heads", "num_heads") if hasattr(attn, name))
    head_dim = getattr(attn, "head_dim", None)
    if head_dim is None:
        head_dim = getattr(attn, "inner_dim", projection.out_features) // heads
    return heads, head_dim, projection.in_features


def _grid_tokens_behind(arguments: dict[str, Any], layouts: tuple[TokenLayout, ...]) -> torch.Tensor | None:
    """`encoder_hidden_states` if they are grid tokens as well, as in the decoder of Motif-Video, and not text."""
    states = arguments.get("encoder_hidden_states")
    if not isinstance(states, torch.Tensor) or layouts[0].num_text or len(layouts[0].grids) < 2:
        return None
    length = arguments["hidden_states"].shape[1] + states.shape[1]
    return states if length == layouts[0].length else None


def _with_native_attention(processor: Any) -> Any:
    """A shallow copy of a stock processor that always makes the call we answer, whatever the active backend is.

    The copy of a module shares its weights and submodules, also when they move or are replaced.
    """
    if not hasattr(processor, "_attention_backend"):
        return processor
    processor = copy.copy(processor)
    processor._attention_backend = AttentionBackendName.NATIVE
    return processor
