"""The files of saved linear attention: written all or none, opened and checked before any tensor is read."""

from __future__ import annotations

import itertools
import json
import math
import re
import reprlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_linattn.files import parse_json, read_json, write_json
from diffusers_linattn.sharing.safetensors_header import Header, TensorInfo, read_header
from diffusers_linattn.sharing.saved_config import (
    CONFIG_KEY,
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    MAX_NAME_LENGTH,
    SavedConfig,
    parse_config,
)
from diffusers_linattn.sharing.sources import Source, check_weight_name


WEIGHTS_NAME = "linear_attention.safetensors"
MAX_SHARDS = 1_000
MAX_INDEX_BYTES = 4 << 20
# What files are read from can be larger than all tensors that could belong to the model by this much. A number of a
# tensor takes no more than 8 bytes.
MAX_OVERHEAD = 16 << 20
MAX_BYTES_PER_NUMBER = 8


# By the names of tensors in our format.
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, its name there, and what the file's header says of it."""

    path: Path
    name: str
    info: TensorInfo


@dataclass(frozen=True)
class Checkpoint:
    """Saved linear attention.

    Args:
        config: What it is.
        tensors: Where its tensors are, by their names in our format.
        where: What to call it in errors.
        files: Its files: the configuration if it stands in one, the index if there is one, the weights.
        copies: The configuration as the files of weights repeat it.
    """

    config: SavedConfig
    tensors: Mapping[str, StoredTensor]
    where: str
    files: tuple[Path, ...]
    copies: Mapping[Path, SavedConfig] = field(default_factory=dict)

    def check_tensors(self, expected: Shapes) -> None:
        """Compare the tensors with what a model needs.

        Raises:
            ValueError: Others, or other shapes.
        """
        _check_names(self.tensors.keys(), expected, self.files[-1])
        for name, shape in expected.items():
            stored = self.tensors[name]
            if stored.info.shape != shape:
                raise ValueError(f"{stored.path}: {name} has shape {stored.info.shape}, this model needs {shape}.")

    def check_copies(self) -> None:
        """Compare the configuration with the copies of it in the files of weights.

        Raises:
            ValueError: They differ, as when a file of one save lies beside those of another.
        """
        for path, copy in self.copies.items():
            if not copy.same_tensors(self.config):
                raise ValueError(
                    f"{path} was saved with another configuration than {self.where}: they do not belong together. "
                    "Save or download all of them again."
                )

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """A function from a tensor's name to the tensor, read from the file at each call."""
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}

            def read(name: str) -> torch.Tensor:
                stored = self.tensors[name]
                try:
                    if stored.path not in opened:
                        opened[stored.path] = stack.enter_context(safe_open(stored.path, framework="pt"))
                    return opened[stored.path].get_tensor(stored.name)
                except (OSError, SafetensorError) as error:
                    raise ValueError(f"{stored.path} cannot be read: {error}. Save or download it again.") from error

            yield read


# Recognises another layout by the names of the tensors in a file, and describes it in ours: the configuration, and the
# name in the file for each of our names. `None` when it is not that layout.
Importer = Callable[[str, Header], "tuple[SavedConfig, dict[str, str]] | None"]

# Checks a configuration, found at a place, against a model, and says which tensors have to come with it.
Expectation = Callable[[SavedConfig, str], Shapes]


def open_checkpoint(
    source: Source,
    *,
    variant: str | None = None,
    weight_name: str | None = None,
    max_bytes: int,
    import_layout: Importer | None = None,
    expect: Expectation | None = None,
) -> Checkpoint:
    """Find the files of saved linear attention and check them against each other.

    Weights are downloaded last: what their configuration and their index already rule out never is.

    Args:
        source: Where they are.
        variant: As in [`weights_file`].
        weight_name: One file to load, instead of the names of the format. It needs no configuration beside it.
        max_bytes: A file that is larger cannot belong to the model, and is not downloaded.
        import_layout: For a file without a configuration.
        expect: What the model needs; it may raise.

    Raises:
        ValueError: Missing, broken or contradictory files, or tensors other than expected.
    """
    if weight_name is None:
        checkpoint = _open_set(source, variant, max_bytes, expect)
    elif variant is None:
        checkpoint = _open_one(source, check_weight_name(weight_name), max_bytes, import_layout)
        if expect is not None:
            checkpoint.check_tensors(expect(checkpoint.config, checkpoint.where))
    else:
        raise ValueError("weight_name names one file and variant a set of files: give one of them.")
    source.remember()
    return checkpoint


def write_checkpoint(
    directory: Path,
    config: SavedConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    max_shard_size: int | str,
    variant: str | None,
) -> None:
    """Write the files of the format into a folder, in place of those of the same variant that are there.

    Args:
        directory: Made if it does not exist.
        config: What is saved.
        tensors: By their names in the format.
        max_shard_size: Larger weights become several files with an index.
        variant: A word in the names.

    Raises:
        ValueError: The folder holds another variant, and its configuration would no longer be true.
    """
    pattern = weights_file(variant).removesuffix(".safetensors") + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard_size)
    shards = split.filename_to_tensors or {weights_file(variant): []}
    _check_other_variants(directory, variant, config)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        # One entry: safetensors writes several in random order.
        metadata = {CONFIG_KEY: json.dumps(config.to_json(), sort_keys=True)}
        for name, keys in shards.items():
            save_file({key: _on_cpu(tensors[key]) for key in keys}, Path(temporary, name), metadata=metadata)
        names = list(shards)
        if len(shards) > 1:
            index = {"metadata": {"total_size": split.metadata["total_size"]}, "weight_map": split.tensor_to_filename}
            write_json(Path(temporary, index_file(variant)), index)
            names.append(index_file(variant))
        write_json(Path(temporary, CONFIG_NAME), config.to_json())
        names.append(CONFIG_NAME)
        # The configuration goes first and comes back last: a folder without one is nobody's checkpoint.
        (directory / CONFIG_NAME).unlink(missing_ok=True)
        for old in list(directory.iterdir()):
            if variant_of(old.name) == (variant,) and old.name not in names:
                old.unlink()
        for name in names:
            Path(temporary, name).replace(directory / name)


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu().contiguous()
    # safetensors takes no part of a larger storage.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _check_other_variants(directory: Path, variant: str | None, config: SavedConfig) -> None:
    path = directory / CONFIG_NAME
    variants = {variant_of(old.name) for old in directory.iterdir()} if path.exists() else set()
    others = sorted(str(found[0]) for found in variants - {(variant,), None} if found)
    if not others:
        return
    if not parse_config(read_json(path, MAX_CONFIG_BYTES), str(path)).same_tensors(config):
        raise ValueError(
            f"{directory} also holds the variant {', '.join(others)}, of another conversion than this: both share "
            f"{CONFIG_NAME}. Save to another folder."
        )


def weights_file(variant: str | None = None) -> str:
    """The name of the weights: `linear_attention.safetensors`, `linear_attention.fp16.safetensors`."""
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_]{1,32}", variant):
        raise ValueError(f"variant must be a short word such as 'fp16', got {variant!r}.")
    return f"linear_attention.{variant}.safetensors" if variant else WEIGHTS_NAME


def index_file(variant: str | None = None) -> str:
    """The name of the index of sharded weights, as diffusers places the variant in it."""
    return f"{WEIGHTS_NAME}.index.{variant}.json" if variant else f"{WEIGHTS_NAME}.index.json"


def variant_of(name: str) -> tuple[str | None] | None:
    """`(variant,)` if `name` is that of weights or of an index in our format, else `None`."""
    match = re.fullmatch(
        r"linear_attention(?:\.(?P<a>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors"
        r"|linear_attention\.safetensors\.index(?:\.(?P<b>\w+))?\.json",
        name,
    )
    return match and (match["a"] or match["b"],)


def refuse_others(source: Source) -> None:
    """Explain what cannot be loaded if the source holds weights of LinFusion, or a model or pipeline of diffusers."""
    for name in ("config.json", "model_index.json"):
        path = source.find(name, MAX_CONFIG_BYTES)
        try:
            content = None if path is None else read_json(path, MAX_CONFIG_BYTES)
        except ValueError:
            continue
        kind = content.get("_class_name") if isinstance(content, dict) else None
        if kind == "LinFusion":
            raise ValueError(
                f"{source.where} holds weights of LinFusion: whole attention modules of the UNets of Stable "
                "Diffusion, which no transformer has. Load them with LinFusion's own code into such a pipeline."
            )
        if isinstance(kind, str):
            raise ValueError(
                f"{source.where} holds a {kind[:100]} as save_pretrained writes it: from_pretrained loads it. Linear "
                "attention is saved with save_linear_attention."
            )


def _open_set(source: Source, variant: str | None, max_bytes: int, expect: Expectation | None) -> Checkpoint:
    config_path = source.find(CONFIG_NAME, MAX_CONFIG_BYTES)
    if config_path is None:
        refuse_others(source)
        raise ValueError(
            f"{source.where}: {CONFIG_NAME} does not exist. {source.advice} For the published weights of CLEAR give "
            'weight_name="clear_local_16.safetensors" or another of its files.'
        )
    config = parse_config(read_json(config_path, MAX_CONFIG_BYTES), str(config_path))
    expected = expect(config, str(config_path)) if expect is not None else None
    if expected is not None:
        numbers = sum(math.prod(shape) for shape in expected.values())
        max_bytes = min(max_bytes, MAX_OVERHEAD + MAX_BYTES_PER_NUMBER * numbers)
    path = source.find(weights_file(variant), max_bytes)
    if path is not None:
        headers = {path: read_header(path)}
        files: tuple[Path, ...] = (config_path, path)
    else:
        index_path = source.find(index_file(variant), MAX_INDEX_BYTES)
        if index_path is None:
            raise ValueError(
                f"{source.where}: {weights_file(variant)} does not exist, nor {index_file(variant)}, so the weights "
                f"cannot be read. {source.advice}"
            )
        shards = read_index(index_path)
        if expected is not None:
            _check_names(set().union(*shards.values()), expected, index_path)
        headers = _read_shards(source, index_path, shards, max_bytes)
        files = (config_path, index_path, *headers)
    copies = {path: copy for path, header in headers.items() if (copy := config_in(header, path)) is not None}
    checkpoint = Checkpoint(config, _place(headers), str(config_path), files, copies)
    if expected is not None:
        checkpoint.check_tensors(expected)
    return checkpoint


def _open_one(source: Source, name: str, max_bytes: int, import_layout: Importer | None) -> Checkpoint:
    path = source.get(name, max_bytes)
    header = read_header(path)
    config = config_in(header, path)
    if config is not None:
        return Checkpoint(config, _place({path: header}), str(path), (path,))
    config_path = source.find(CONFIG_NAME, MAX_CONFIG_BYTES)
    if config_path is not None:
        config = parse_config(read_json(config_path, MAX_CONFIG_BYTES), str(config_path))
        return Checkpoint(config, _place({path: header}), str(config_path), (config_path, path))
    imported = import_layout(name, header) if import_layout else None
    if imported is None:
        refuse_others(source)
        raise ValueError(
            f"{path} has neither a configuration in it nor {CONFIG_NAME} beside it, and its tensors are not named as "
            "CLEAR's are. It is not known how to load it."
        )
    config, names = imported
    return Checkpoint(
        config, {ours: StoredTensor(path, its, header.tensors[its]) for ours, its in names.items()}, str(path), (path,)
    )


def read_index(path: Path) -> dict[str, set[str]]:
    """The tensors of each file of sharded weights.

    Raises:
        ValueError: No index, too many files, or names that lead out of the folder.
    """
    index = read_json(path, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map from tensors to files.")
    files: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(name if isinstance(name, str) else "", set()).add(tensor)
    if len(files) > MAX_SHARDS:
        raise ValueError(f"{path} names {len(files)} files; at most {MAX_SHARDS} are read.")
    for name in files:
        check_weight_name(name)
    return files


def list_some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are. Files of others may have any."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    shown = (name if name.isprintable() and len(name) <= MAX_NAME_LENGTH else reprlib.repr(name) for name in names)
    return ", ".join(itertools.islice(shown, most)) + rest


def _check_names(present: Collection[str], expected: Shapes, where: Path) -> None:
    missing, extra = sorted(set(expected) - set(present)), sorted(set(present) - set(expected))
    if missing or extra:
        problems = [
            f"{kind} {list_some(names)}" for kind, names in (("misses", missing), ("has extra", extra)) if names
        ]
        raise ValueError(
            f"{where} {' and '.join(problems)}. It does not belong to its {CONFIG_NAME}, or to another processor."
        )


def _read_shards(
    source: Source, index_path: Path, shards: Mapping[str, set[str]], max_bytes: int
) -> dict[Path, Header]:
    """The headers of all files, which together have at most `max_bytes`."""
    headers = {}
    for name, tensors in shards.items():
        path = source.get(name, max_bytes)
        max_bytes -= path.stat().st_size
        headers[path] = read_header(path)
        if set(headers[path].tensors) != tensors:
            raise ValueError(
                f"{path} does not hold the tensors that {index_path.name} says. Save or download all files again."
            )
    return headers


def config_in(header: Header, path: Path | str) -> SavedConfig | None:
    """The copy of the configuration in a file of weights, if it has one."""
    text = header.metadata.get(CONFIG_KEY)
    if text is None:
        return None
    return parse_config(parse_json(text, f"the configuration in {path}"), f"the configuration in {path}")


def _place(headers: Mapping[Path, Header]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(path, name, info)
        for path, header in headers.items()
        for name, info in header.tensors.items()
    }
