"""What there is to know of a model whose weights are moved to and fro by group offloading."""

from __future__ import annotations

from typing import Any


def check_offloading(model: Any) -> None:
    """Refuse a model whose weights lie on disk: what is put into its parameters would be overwritten from there.

    Raises:
        ValueError: Such a model.
    """
    if is_on_disk(model):
        raise ValueError(
            "The model is offloaded to disk, where new weights would not arrive: convert it, or load them, before "
            "enable_group_offload(offload_to_disk_path=...)."
        )


def is_on_disk(model: Any) -> bool:
    """Whether group offloading keeps weights on disk: what its parameters hold between calls is arbitrary."""
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = (hook for registry in registries for hook in getattr(registry, "hooks", {}).values())
    return any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None for hook in hooks)


def offload_again(model: Any) -> None:
    """Let group offloading, where it is enabled, take in the modules that have been added."""
    if any(hasattr(module, "_diffusers_hook") for module in model.modules()):
        # As diffusers itself does after loading a LoRA.
        from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading

        _maybe_remove_and_reapply_group_offloading(model)
