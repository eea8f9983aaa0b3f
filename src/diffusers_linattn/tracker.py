"""Follows the token layout of a transformer from call to call, so that its attention processors can read it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffusers_linattn.layout import TokenLayout
from diffusers_linattn.models import Family, ForwardArguments


class LayoutTracker:
    """A forward pre-hook that works out the [`TokenLayout`] of each call of one transformer.

    The processors of the model share the tracker; neither refers to the model.
    """

    def __init__(self, model: nn.Module, family: Family):
        self.family = family
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.last: TokenLayout | None = None
        self._memo: dict[str, tuple[torch.Tensor, int, Any]] = {}
        self._kinds: tuple[str, ...] = ()
        self._sizes: list[torch.Tensor] = []

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.set(self.family.layout(model, ForwardArguments(arguments, self._memo)))
        if torch.is_grad_enabled():
            _prepare_for_training(model, self)

    def set(self, layout: TokenLayout | None) -> None:
        """Make `layout` the one that [`layout_of`] answers with."""
        if layout == self.last and not torch.compiler.is_compiling():
            return
        self.last = layout
        segments = layout.segments if layout is not None else ()
        # The sizes again, as shapes of tensors without elements: inside a compiled block they become symbolic sizes,
        # where plain integers would be guards and cost one graph for each resolution.
        self._kinds = tuple(segment.kind for segment in segments)
        self._sizes = [torch.empty(0, *(segment.grid or (segment.length,))) for segment in segments]

    def layout_of(self, scope: str) -> TokenLayout:
        """The layout of the current call for a layer that attends over `scope`, `"joint"` or `"image"`.

        Raises:
            ValueError: The model has not been called: its layers cannot be called on their own.
        """
        layout = self.last
        if layout is None:
            raise ValueError(
                "No token layout: call the transformer (or its pipeline), not one of its layers. The layout is read "
                "from the arguments of the transformer's forward."
            )
        if torch.compiler.is_compiling():
            sizes = [tuple(size.shape[1:]) for size in self._sizes]
            layout = TokenLayout.of(
                [(kind, size if len(size) == 3 else size[0]) for kind, size in zip(self._kinds, sizes, strict=True)]
            )
        return layout.image_part() if scope == "image" else layout


class CheckpointWithLayout:
    """A gradient checkpointing function that recomputes each block under the layout of its forward pass.

    Without it, recomputation during backward would see the layout of the latest forward, which may be another size.
    """

    def __init__(self, checkpoint: Callable[..., Any], tracker: LayoutTracker):
        self.checkpoint = checkpoint
        self.tracker = tracker

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layout = self.tracker.last

        def run(*inputs: Any, **named: Any) -> Any:
            current = self.tracker.last
            self.tracker.set(layout)
            try:
                return block(*inputs, **named)
            finally:
                self.tracker.set(current)

        return self.checkpoint(run, *args, **kwargs)


@torch.compiler.disable
def _prepare_for_training(model: nn.Module, tracker: LayoutTracker) -> None:
    """What a forward pass with gradients needs: layouts carried through checkpoints, weights kept for `restore`."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function: Any = module._gradient_checkpointing_func
            if not isinstance(function, CheckpointWithLayout):
                module._gradient_checkpointing_func = CheckpointWithLayout(function, tracker)  # type: ignore[assignment]
        processor: Any = getattr(module, "processor", None)
        if getattr(processor, "tracker", None) is tracker:
            trained = [name for name, p in processor.weights_of(module).items() if p.requires_grad]
            processor.keep_original_weights(module, trained)


def install_tracker(model: nn.Module, family: Family) -> LayoutTracker:
    """The tracker of a model, hooked onto it if it has none yet."""
    tracker = find_tracker(model)
    if tracker is None:
        tracker = LayoutTracker(model, family)
        model.register_forward_pre_hook(tracker, with_kwargs=True)
    return tracker


def find_tracker(model: nn.Module) -> LayoutTracker | None:
    """The tracker hooked onto a model. Found by type, so that it is also found on a deep copy."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, LayoutTracker)), None)


def remove_tracker(model: nn.Module) -> None:
    """Take the hook off again, and give back the checkpointing functions."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, LayoutTracker):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, CheckpointWithLayout):
            module._gradient_checkpointing_func = function.checkpoint  # type: ignore[assignment]
