"""Feature maps of linear attention: what stands for exp(q·k) once the softmax is gone."""

from __future__ import annotations

import torch

from diffusers_linattn.ops.reference import FEATURE_MAPS, FeatureMap


FeatureMapArgument = str | tuple[FeatureMap, FeatureMap]


def resolve_feature_map(feature_map: FeatureMapArgument) -> tuple[FeatureMap, FeatureMap]:
    """The functions that turn query and key into features, from a name or from a pair of callables.

    Named maps compute in fp32 at least. Callables (learned maps with their own weights) get query and key in the
    dtype they came in, under the caller's autocast, and only their result is raised to fp32.

    Args:
        feature_map: `"relu"` (LiT, arXiv 2501.12976), `"elu"` or `"softmax"` (over the channels), or a pair
            `(query_features, key_features)` from (batch, heads, tokens, head_dim) to (batch, heads, tokens, features),
            non-negative where there is a denominator.

    Raises:
        ValueError: An unknown name, or anything else that is not a pair of callables; when the functions are called,
            features that are not of the same batch, heads and tokens.

    Example:
        >>> import torch
        >>> query_features, key_features = resolve_feature_map("elu")
        >>> query_features(torch.tensor([-0.0, 2.0], dtype=torch.bfloat16))
        tensor([1., 3.])
    """
    if isinstance(feature_map, str) and feature_map in FEATURE_MAPS:
        named = FEATURE_MAPS[feature_map]
        return (lambda x: named(full_precision(x))), (lambda x: named(full_precision(x)))
    if isinstance(feature_map, (tuple, list)) and len(feature_map) == 2 and all(map(callable, feature_map)):
        of_query, of_key = feature_map
        return (lambda x: _features_of(x, of_query)), (lambda x: _features_of(x, of_key))
    raise ValueError(
        f"Unknown feature_map {feature_map!r}: expected one of {', '.join(map(repr, FEATURE_MAPS))}, or a pair "
        "(query_features, key_features) of callables for a learned map such as hedgehog."
    )


def _features_of(x: torch.Tensor, learned_map: FeatureMap) -> torch.Tensor:
    features = learned_map(x)
    if features.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"The feature map made {tuple(features.shape)} of {tuple(x.shape)}: expected (batch, heads, tokens, "
            "features) of the same batch, heads and tokens."
        )
    return full_precision(features)


def check_features(phi_q: torch.Tensor, phi_k: torch.Tensor) -> None:
    """Raise a ValueError unless queries have as many features as keys."""
    if phi_q.shape[-1] != phi_k.shape[-1]:
        raise ValueError(
            f"The feature map gives queries {phi_q.shape[-1]} features and keys {phi_k.shape[-1]}: expected as many."
        )


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or in fp64 if it is fp64: what the sums of linear attention are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
