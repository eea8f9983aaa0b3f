"""What published linear attention is, read from its configuration and the headers of its weights alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_linattn.files import read_json
from diffusers_linattn.sharing.checkpoint import (
    MAX_INDEX_BYTES,
    config_in,
    index_file,
    read_index,
    refuse_others,
    weights_file,
)
from diffusers_linattn.sharing.clear_layout import settings_in_name
from diffusers_linattn.sharing.model_card import summarize_layers
from diffusers_linattn.sharing.safetensors_header import Header
from diffusers_linattn.sharing.saved_config import CONFIG_NAME, MAX_CONFIG_BYTES, SavedConfig, SavedLayer, parse_config
from diffusers_linattn.sharing.sources import Source, check_weight_name, open_source


_OF_CLEAR = "the authors of CLEAR"


@dataclass(frozen=True)
class Summary:
    """What is known of linear attention without its weights; prints as a few lines.

    Args:
        where: The repository with its commit, or the folder.
        config: Its configuration.
        files: How many files of weights there are.
        size: Their bytes.
        tensors: How many tensors are in them.
        parameters: How many numbers those hold.
        dtypes: As safetensors names them.
        written_by: The program that wrote the files.
    """

    where: str
    config: SavedConfig
    files: int
    size: int
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    written_by: str

    def __str__(self) -> str:
        config = self.config
        revision = f" at {config.base_model_revision}" if config.base_model_revision else ""
        rows = [
            ("", self.where),
            ("for", f"{config.transformer} of {config.base_model or 'an unnamed model'}{revision}"),
            *(("converts", f"{_count(count, 'layer')}: {how}") for how, count in summarize_layers(config).items()),
            (
                "weights",
                f"{_count(self.tensors, 'tensor')} of {_count(self.parameters, 'parameter')} "
                f"({', '.join(self.dtypes) or 'none'}), {_size(self.size)} in {_count(self.files, 'file')}",
            ),
            ("recipe", json.dumps(config.recipe) if config.recipe else "not recorded"),
            *(("metric", f"{json.dumps(name)} {value:.5g}") for name, value in config.metrics.items()),
            ("written by", self.written_by),
        ]
        return "\n".join(f"{label:<12}{text}".strip() for label, text in rows)


def summarize(
    repo_or_directory: str | Path, *, variant: str | None = None, weight_name: str | None = None, **where: Any
) -> Summary:
    """Describe linear attention from its configuration and, by range request, the first bytes of its weights.

    Args:
        repo_or_directory: As in [`load_linear_attention`].
        variant: As there.
        weight_name: As there.
        where: revision, subfolder, token and the other arguments of [`open_source`].

    Raises:
        ValueError: As in loading.
    """
    source = open_source(repo_or_directory, **where)
    path = source.find(CONFIG_NAME, MAX_CONFIG_BYTES)
    config = None if path is None else parse_config(read_json(path, MAX_CONFIG_BYTES), str(path))
    headers = _headers(source, variant, weight_name)
    if weight_name is not None:
        header, _ = headers[weight_name]
        config = config_in(header, weight_name) or config or _clear_config(weight_name, header)
    if config is None:
        raise ValueError(f"{source.where}: {CONFIG_NAME} does not exist. {source.advice}")
    ours = f"diffusers-linattn {config.library_version}"
    infos = [info for header, _ in headers.values() for info in header.tensors.values()]
    commit = getattr(source, "commit", None)
    return Summary(
        where=f"{repo_or_directory} at {commit}" if commit else source.where,
        config=config,
        files=len(headers),
        size=sum(size for _, size in headers.values()),
        tensors=len(infos),
        parameters=sum(math.prod(info.shape) for info in infos),
        dtypes=tuple(sorted({info.dtype for info in infos})),
        written_by=ours if config.library_version != _OF_CLEAR else _OF_CLEAR,
    )


def _headers(source: Source, variant: str | None, weight_name: str | None) -> dict[str, tuple[Header, int]]:
    name = check_weight_name(weight_name) if weight_name is not None else weights_file(variant)
    found = source.header(name)
    if found is not None:
        return {name: found}
    index_path = None if weight_name else source.find(index_file(variant), MAX_INDEX_BYTES)
    if index_path is None:
        refuse_others(source)
        raise ValueError(f"{source.where}: {name} does not exist. {source.advice}")
    headers = {}
    for shard in read_index(index_path):
        found = source.header(shard)
        if found is None:
            raise ValueError(f"{source.where}: {shard} does not exist, though the index names it.")
        headers[shard] = found
    return headers


def _clear_config(name: str, header: Header) -> SavedConfig | None:
    """What a file that the authors of CLEAR published says by its name and its tensors."""
    processor = settings_in_name(name)
    layers: dict[str, list[str]] = {}
    for key in header.tensors:
        match = re.fullmatch(r"((?:single_)?transformer_blocks\.\d+\.attn)\.(.+)", key)
        if match:
            layers.setdefault(match[1], []).append(match[2])
    if processor is None or not layers:
        return None
    return SavedConfig(
        transformer="FluxTransformer2DModel",
        layers={
            layer: SavedLayer(processor, tuple(name for name in names if not name.startswith("processor.")))
            for layer, names in layers.items()
        },
        base_model="black-forest-labs/FLUX.1-dev",
        library_version=_OF_CLEAR,
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(size: int) -> str:
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB"):  # noqa: B007
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
