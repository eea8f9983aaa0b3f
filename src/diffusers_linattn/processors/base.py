"""The processor that answers the attention call of a layer's own processor."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn
from torch.overrides import TorchFunctionMode

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.ops.checks import check_choice
from diffusers_linattn.tracker import LayoutTracker


# Set by diffusers on every processor (`set_attention_backend`, `enable_parallelism`): they move with the place.
HOST_ATTRIBUTES = ("_attention_backend", "_parallel_config")

Processor = TypeVar("Processor", bound="BaseProcessor")


@dataclass
class AttentionCall:
    """One attention call of a layer, as its processor answers it.

    Args:
        query: `(batch, heads, tokens, head_dim)`, after the model's own projections, norms and rotary embedding.
        key: The same; with grouped queries (`enable_gqa`) it has fewer heads.
        value: The same.
        layout: What the tokens are.
        mask: Boolean (True = visible) or additive mask that broadcasts to `(batch, heads, tokens, tokens)`, or `None`.
        scale: Softmax scale; `None` is `head_dim ** -0.5`.
        enable_gqa: Whether key and value may have fewer heads.
        hidden_states: The input of the layer, `(batch, tokens or image tokens, channels)`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: TokenLayout
    mask: torch.Tensor | None
    scale: float | None
    enable_gqa: bool
    hidden_states: torch.Tensor


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
    _stock_call: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        cls.plain_class = vars(cls).get("plain_class", cls)

    def __init__(self, *, reset_projections: bool, impl: str | None) -> None:
        super().__init__()
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
        return _new_signed, (self.plain_class, self._stock_call), self.__dict__

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.to_config().items())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

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

    def prepare(self, hidden_states: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """Change the input of the layer before its projections; the default leaves it alone."""
        return hidden_states

    def implementation(self, layout: TokenLayout | None) -> str:
        """Which implementation answers a call over `layout`, in words for `status`."""
        return self.impl or self.impls[0]

    def copy_for_layer(self: Processor, attn: nn.Module, original: Any, *, index: int, scope: str) -> Processor:
        """A fresh processor with this configuration for the layer `attn`, whose processor `original` it will hold.

        It is not installed yet: that also takes a place in the layer and the model's tracker.
        """
        stock_call = original if inspect.isfunction(original) else type(original).__call__
        processor = _signed_class(self.plain_class, stock_call).from_config(self.to_config())
        weight = next(
            (p for p in attn.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
            torch.empty(0),
        )
        # Seeded by layer, so that converting neither reads nor moves the user's random state.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(index)
            processor.build(*attention_size(attn), index=index)
        if weight.is_meta:
            if any(hasattr(module, "_hf_hook") for module in attn.modules()):
                raise ValueError(
                    "the model is offloaded weight by weight, and weights that are added now would not be: convert it "
                    "before enable_sequential_cpu_offload()."
                )
            processor.to_empty(device="meta")
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
            raise ValueError(
                "Context parallelism splits the sequence, which windows and scans over the token grid cannot see "
                "across. Disable it, or restore(model) the original attention first."
            )
        layout = self.tracker.layout_of(self.scope)
        names = self.argument_names
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        arguments["hidden_states"] = self.prepare(arguments["hidden_states"], layout)
        extra = args[len(names) :]
        passed: list[tuple[int, int]] = []
        answered: list[bool] = []
        with _AnswerAttention(self, layout, arguments["hidden_states"], answered, passed):
            # Arguments beyond the named ones are only possible behind a *args, and then all must stay positional.
            output = self.stock(attn, *args, **kwargs) if extra else self.stock(attn, **arguments)
        if not answered:
            raise ValueError(
                f"The tokens do not match the layout: {type(self).__name__} expected {layout.length} query and key "
                f"tokens ({layout}), but the layer attended over {passed}. restore(model) gives the original "
                "attention back."
            )
        return output

    def keep_original_weights(self, attn: nn.Module, names: Iterable[str]) -> None:
        """Keep a copy of weights of the layer before they change, for `restore`. Kept once; later calls add names."""
        weights = self.weights_of(attn)
        for name in names:
            if name not in self.original_weights and not weights[name].is_meta:
                self.original_weights[name] = weights[name].detach().clone()

    @staticmethod
    def weights_of(attn: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of a layer without those of its processor, under the names they have without a LoRA."""
        return {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in attn.named_parameters()
            if not name.startswith("processor.") and ".lora_" not in name
        }

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that this processor adds to the model, without those of a stock processor it holds."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("original.")}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        # The kept weights follow the model to another device or dtype.
        super()._apply(fn, recurse)
        self.original_weights = {name: fn(weight) for name, weight in self.original_weights.items()}
        return self


def _make_signed_class(cls: type[BaseProcessor], stock_call: Callable[..., Any]) -> Any:
    """`cls` with the call signature of a stock processor.

    Attention classes of diffusers pass on only those arguments whose names stand in the signature of
    `processor.__call__`. It has to be a class, shared by all layers with that stock processor: with a signature on
    each instance, `torch.compile` would compile every block anew.
    """
    parameters = list(inspect.signature(stock_call).parameters.values())
    if next(iter(parameters)).name != "self":  # a plain function
        parameters.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD))

    def __call__(self: BaseProcessor, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)

    __call__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in parameters if p.kind in named)[2:]  # without self and attn
    body = {
        "__call__": __call__,
        "__doc__": cls.__doc__,
        "__module__": cls.__module__,
        "argument_names": names,
        "plain_class": cls,
        "_stock_call": staticmethod(stock_call),
    }
    return type(cls.__name__, (cls,), body)


_signed_class: Callable[[Any, Callable[..., Any]], Any] = functools.cache(_make_signed_class)


def _new_signed(cls: type[BaseProcessor], stock_call: Callable[..., Any]) -> BaseProcessor:
    signed = _signed_class(cls, stock_call)
    return signed.__new__(signed)


class _AnswerAttention(TorchFunctionMode):
    """While the stock processor runs: its attention calls over the layout's tokens go to [`BaseProcessor.attend`].

    Other attention calls (cross-attention, IP-Adapter) have other lengths and pass through. What was answered and what
    passed is noted in lists of the caller's: Dynamo cannot read an attribute of the mode after its block.
    """

    def __init__(
        self,
        processor: BaseProcessor,
        layout: TokenLayout,
        hidden_states: torch.Tensor,
        answered: list[bool],
        passed: list[tuple[int, int]],
    ):
        super().__init__()
        self.processor = processor
        self.layout = layout
        self.hidden_states = hidden_states
        self.answered = answered
        self.passed = passed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._answer(*args, **kwargs)
        if func is torch.Tensor.unflatten:
            # Tensor.unflatten is Python that calls super(), which Dynamo cannot trace under a mode (torch 2.13).
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def _answer(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        length = self.layout.length
        if query.shape[2] != length or key.shape[2] != length or dropout_p or is_causal:
            self.passed.append((query.shape[2], key.shape[2]))
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self.answered.append(True)
        device = query.device.type
        if torch.is_autocast_enabled(device):  # what autocast does to the call that is answered here
            dtype = torch.get_autocast_dtype(device)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        call = AttentionCall(query, key, value, self.layout, attn_mask, scale, enable_gqa, self.hidden_states)
        return self.processor.attend(call).to(query.dtype)


def attention_size(attn: Any) -> tuple[int, int, int]:
    """`(heads, head_dim, channels)` of a diffusers attention module; channels is the width of its input."""
    heads = attn.heads
    head_dim = getattr(attn, "head_dim", None) or attn.inner_dim // heads
    return heads, head_dim, attn.query_dim


def _with_native_attention(processor: Any) -> Any:
    """A shallow copy of a stock processor that always makes the call we answer, whatever the active backend is."""
    if isinstance(processor, nn.Module) or not hasattr(processor, "_attention_backend"):
        return processor
    processor = copy.copy(processor)
    processor._attention_backend = AttentionBackendName.NATIVE
    return processor
