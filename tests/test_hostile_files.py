"""Files from strangers: each is refused at once and in little memory, or loads."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from diffusers_linattn import ClearProcessor, linearize, load_linear_attention, save_linear_attention, status
from diffusers_linattn.files import parse_json
from diffusers_linattn.sharing.checkpoint import WEIGHTS_NAME
from diffusers_linattn.sharing.safetensors_header import Header, parse_header, read_header
from diffusers_linattn.sharing.saved_config import CONFIG_KEY, CONFIG_NAME, SavedConfig, parse_config

import tiny


LAYER = "transformer_blocks.0.attn"
EMPTY = {"processor": "clear", "arguments": {}, "weights": []}
POOL = f"{LAYER}.processor.pool.spatial_weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_linear_attention(linearize(tiny.flux(), ClearProcessor(window=2, down_factor=2)), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def config_of(folder: Path) -> Any:
    return json.loads((folder / CONFIG_NAME).read_text())


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the configuration, in a folder whose weights carry no copy of it."""
    config = config_of(folder)
    change(config)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    save_file(load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)


def argument(name: str, value: Any) -> Callable[[Path], None]:
    return lambda d: edit(d, lambda c: c["layers"][LAYER]["arguments"].update({name: value}))


def header(folder: Path, change: Callable[[Any], Any], length: int | None = None) -> None:
    """Change the JSON in front of the tensors."""
    content = (folder / WEIGHTS_NAME).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    parsed = json.loads(content[8 : 8 + size])
    changed = change(parsed)
    text = changed if isinstance(changed, bytes) else json.dumps(changed or parsed).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (folder / WEIGHTS_NAME).write_bytes(prefix + text + content[8 + size :])


def tensor(name: str = POOL, **entry: Any) -> Callable[[Path], None]:
    return lambda d: header(d, lambda h: h[name].update(entry))


def poison(value: float, dtype: torch.dtype) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        tensors[POOL].view(-1)[3] = value
        save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / WEIGHTS_NAME)

    return damage


def replace(name: str, link: str | Path) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(link)

    return damage


def link_to_a_copy_outside(folder: Path) -> None:
    outside = folder.parent / f"{folder.name} outside"
    outside.mkdir()
    (folder / WEIGHTS_NAME).rename(outside / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).symlink_to(outside / WEIGHTS_NAME)


def pipe(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    os.mkfifo(folder / WEIGHTS_NAME)


def index(folder: Path, weight_map: Any) -> None:
    (folder / WEIGHTS_NAME).unlink()
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def sparse(folder: Path, name: str, size: int) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(size)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "header of 100 GB": (lambda d: header(d, lambda h: h, length=100 << 30), "header has 107374182400 bytes"),
    "header of 2**64 - 1": (lambda d: header(d, lambda h: h, length=(1 << 64) - 1), "header has 1844674407370955"),
    "header longer than the file": (lambda d: header(d, lambda h: h, length=1 << 20), "cut short"),
    "header of spaces": (lambda d: header(d, lambda h: b" " * (2 << 20)), "not valid JSON"),
    "header of brackets": (lambda d: header(d, lambda h: b"[" * (2 << 20)), "not valid JSON"),
    "header of tensors": (
        lambda d: header(
            d,
            lambda h: {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)},
        ),
        "names 30000 tensors; at most 20000",
    ),
    "header with duplicate keys": (
        lambda d: header(d, lambda h: json.dumps(h).encode()[:-1] + b', "' + POOL.encode() + b'": {}}'),
        "stands twice in one object",
    ),
    "no header": (lambda d: (d / WEIGHTS_NAME).write_bytes(b"abc"), "no safetensors file: it has 3 bytes"),
    "overlapping tensors": (tensor(data_offsets=[16, 32]), "overlap|leave a gap|describes"),
    "a gap": (lambda d: header(d, lambda h: h.pop(POOL) and None), "leave a gap|describes"),
    "bytes at the end": (lambda d: sparse(d, WEIGHTS_NAME, 50_000), "describes 0 to"),
    "offsets that run backwards": (tensor(data_offsets=[16, 0]), "cannot have -16 bytes"),
    "negative offsets": (tensor(data_offsets=[-16, 0]), "impossible shape or data_offsets"),
    "a shape too large": (tensor(shape=[1 << 60, 1 << 60]), "cannot have 16 bytes"),
    "a shape of strings": (tensor(shape=["4"]), "impossible shape"),
    "a shape of true": (tensor(shape=[True]), "impossible shape"),
    "int8": (tensor(dtype="I8", shape=[16]), 'has dtype "I8", expected one of BF16'),
    "a dtype that is a list": (tensor(dtype=["F32"]), "has dtype"),
    "pickle": (lambda d: (d / WEIGHTS_NAME).write_bytes(b"\x80\x04\x95" + bytes(500)), "header|JSON"),
    "NaN": (poison(float("nan"), torch.float32), "NaN or infinite"),
    "infinity in bf16": (poison(float("inf"), torch.bfloat16), "NaN or infinite"),
    "10,000 layers": (
        lambda d: edit(d, lambda c: c["layers"].update({f"x{i}": EMPTY for i in range(10_000)})),
        "converts 10004 layers; at most 1000",
    ),
    "900 layers": (
        lambda d: edit(d, lambda c: c["layers"].update({f"x.{i}.attn": c["layers"][LAYER] for i in range(900)})),
        "layers that this FluxTransformer2DModel does not have",
    ),
    "a configuration of 50 MB": (
        lambda d: (d / CONFIG_NAME).write_bytes(b'{"a": "' + b"b" * (50 << 20) + b'"}'),
        "has 52428809 bytes",
    ),
    "a configuration of 1 MB of brackets": (
        lambda d: (d / CONFIG_NAME).write_bytes(b'{"layers": ' + b"[" * 1_000_000),
        "not valid JSON",
    ),
    "a number of a million digits": (
        lambda d: (d / CONFIG_NAME).write_bytes(b'{"layers": ' + b"9" * 1_000_000 + b"}"),
        "not valid JSON",
    ),
    "duplicate keys": (
        lambda d: (d / CONFIG_NAME).write_text(
            (d / CONFIG_NAME).read_text().replace('"window": 2', '"window": 2, "window": 9', 1)
        ),
        "the name 'window' stands twice",
    ),
    "not UTF-8": (lambda d: (d / CONFIG_NAME).write_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "NaN in the configuration": (
        lambda d: (d / CONFIG_NAME).write_text((d / CONFIG_NAME).read_text().replace("2,", "NaN,", 1)),
        "not a finite number",
    ),
    "a window of 10**12": (argument("window", 10**12), "window is 1000000000000, at most 65536"),
    "a pool of 10**5": (argument("down_factor", 60_000), "down_factor is 60000, at most 64"),
    "a window of 1e300": (argument("window", 1e300), r"window is 1e\+300, at most"),
    "a window that is a list": (argument("window", [2]), "window must be a number"),
    "a window that is true": (argument("window", True), "window must be an integer"),
    "an implementation": (argument("impl", "reference"), "impl is chosen on the machine that runs"),
    "a class path": (
        lambda d: edit(d, lambda c: c["layers"][LAYER].update(processor="os.system")),
        "unknown processor 'os.system'",
    ),
    "a kind that is a list": (
        lambda d: edit(d, lambda c: c["layers"][LAYER].update(processor=[])),
        "unknown processor",
    ),
    "an unknown key": (lambda d: edit(d, lambda c: c.update(auto_map={"a": "b"})), "unknown keys .'auto_map'."),
    "a newer format": (lambda d: edit(d, lambda c: c.update(format_version=3)), "format_version 3.*upgrade"),
    "an older format": (lambda d: edit(d, lambda c: c.update(format_version=1)), "format_version 1.*save it again"),
    "format true": (lambda d: edit(d, lambda c: c.update(format_version=True)), "format_version True"),
    "a LoRA of rank 10**9": (
        lambda d: edit(d, lambda c: c["layers"][LAYER].update(lora={"to_q": {"rank": 10**9, "scale": 1}})),
        "the rank of to_q must be from 1 to 1024",
    ),
    "a LoRA on the processor": (
        lambda d: edit(d, lambda c: c["layers"][LAYER].update(lora={"processor.pool": {"rank": 1, "scale": 1}})),
        "no linear projection processor.pool",
    ),
    "a weight outside the layer": (
        lambda d: edit(d, lambda c: c["layers"][LAYER].update(weights=["../../proj_out.weight"])),
        "has no weight",
    ),
    "a weight named twice": (
        lambda d: edit(d, lambda c: c["layers"][LAYER].update(weights=["to_q.weight", "to_q.weight"])),
        "more than once",
    ),
    "a terminal's control codes": (lambda d: edit(d, lambda c: c.update(base_model="\x1b[2J")), "printable"),
    "a link out of the folder": (link_to_a_copy_outside, "is a link out of its folder"),
    "a link to a device": (replace(CONFIG_NAME, "/dev/zero"), "is a link out of its folder"),
    "a link to a secret": (replace(CONFIG_NAME, "/etc/passwd"), "is a link out of its folder"),
    "a dangling link": (replace(WEIGHTS_NAME, "/nowhere"), "is a link out of its folder"),
    "a link to itself": (replace(WEIGHTS_NAME, WEIGHTS_NAME), "is not a regular file"),
    "a named pipe": (pipe, "is not a regular file"),
    "an index to elsewhere": (lambda d: index(d, {POOL: "../secret.safetensors"}), "named without a path"),
    "an index to an absolute path": (lambda d: index(d, {POOL: "/etc/secret.safetensors"}), "named without a path"),
    "an index to pickle": (lambda d: index(d, {POOL: "weights.bin"}), r"\.safetensors file"),
    "an index to numbers": (lambda d: index(d, {POOL: 1}), r"\.safetensors file"),
    "an index to what is missing": (
        lambda d: index(d, dict.fromkeys(load_file(d / WEIGHTS_NAME), "a.safetensors")),
        "has no a.safetensors",
    ),
    "an index of other tensors": (lambda d: index(d, {"a" * 10_000 + "\x1b[2J": "a.safetensors"}), r"extra 'aaa.*2J'"),
    "a metric too large": (lambda d: edit(d, lambda c: c.update(metrics={"a": 10**4000})), "must be a finite number"),
    "an index to thousands": (
        lambda d: index(d, {f"{i}": f"a{i}.safetensors" for i in range(5_000)}),
        "names 5000 files; at most 1000",
    ),
    "weights of 1 TB": (lambda d: sparse(d, WEIGHTS_NAME, 1 << 40), "has 1099511627776 bytes where at most"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name: str, folder: Path) -> None:
    damage, message = HOSTILE[name]
    damage(folder)
    model = tiny.flux()
    load_failing(model, folder)  # so that imports are not counted
    start, waited = time.process_time(), time.perf_counter()
    error = load_failing(model, folder)
    seconds, waited = time.process_time() - start, time.perf_counter() - waited
    assert error is not None
    with pytest.raises(ValueError, match=message):
        raise error
    assert len(str(error)) < 2_000
    assert seconds < 5  # it takes a twentieth of one; reading all of it would take minutes
    assert waited < 10  # on a busy machine
    assert not status(model).converted
    tracemalloc.start()
    load_failing(model, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


def load_failing(model: Any, folder: Path) -> ValueError | None:
    try:
        load_linear_attention(model, folder)
    except ValueError as error:
        return error
    return None


def test_a_configuration_that_its_weights_contradict(folder: Path) -> None:
    config = config_of(folder)
    config["layers"][LAYER]["arguments"]["window"] = 9
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was saved with another configuration than .*: they do not belong together"):
        load_linear_attention(tiny.flux(), folder)


def test_no_fallback_to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_NAME), folder / "linear_attention.bin")
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match=r"linear_attention.safetensors does not exist"):
        load_linear_attention(tiny.flux(), folder)


def test_a_link_inside_the_folder_is_followed(folder: Path) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "real.safetensors")
    (folder / WEIGHTS_NAME).symlink_to("real.safetensors")
    assert len(status(load_linear_attention(tiny.flux(), folder)).converted) == 4
    elsewhere = folder / "models--me--x"
    for part in ("snapshots/1", "blobs"):  # the layout of the Hub's cache, with a blob that is none
        (elsewhere / part).mkdir(parents=True)
    (elsewhere / "snapshots" / "1" / CONFIG_NAME).symlink_to("../../blobs/abc")
    (elsewhere / "blobs" / "abc").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        load_linear_attention(tiny.flux(), elsewhere / "snapshots" / "1")
    (folder / "inner").symlink_to(folder.parent)
    with pytest.raises(ValueError, match="is a link out of"):
        load_linear_attention(tiny.flux(), folder, subfolder="inner")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON."""
    children = (
        content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    )
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = json.loads(json.dumps(content))
    target = copy
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return copy


@FUZZ
@given(data=st.data(), value=JSON)
def test_fuzzed_configurations(saved: Path, data: Any, value: Any) -> None:
    config = config_of(saved)
    config["layers"] = {LAYER: {**config["layers"][LAYER], "lora": {"to_q": {"rank": 2, "scale": 1.0}}}}
    path = data.draw(st.sampled_from(places(config)))
    try:
        parsed = parse_config(put(config, path, value), "config")
    except ValueError as error:
        check_message(error)
    else:
        assert isinstance(parsed, SavedConfig)
        text = json.dumps(parsed.to_json())  # compared as text, in which NaN is like itself
        assert json.dumps(parse_config(json.loads(text), "again").to_json()) == text


@FUZZ
@given(data=st.data(), value=JSON)
def test_fuzzed_headers(saved: Path, data: Any, value: Any) -> None:
    content = (saved / WEIGHTS_NAME).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    parsed = json.loads(content[8 : 8 + size])
    text = json.dumps(put(parsed, data.draw(st.sampled_from(places(parsed))), value)).encode()
    check_header(text, len(content) - 8 - size)


@FUZZ
@given(text=st.binary(max_size=200), size=st.integers(0, 1000))
def test_random_bytes_as_header(text: bytes, size: int) -> None:
    check_header(text, size)


@FUZZ
@given(position=st.integers(0, 3_000), byte=st.integers(0, 255))
def test_one_changed_byte_in_a_file(saved: Path, tmp_path: Path, position: int, byte: int) -> None:
    content = bytearray((saved / WEIGHTS_NAME).read_bytes())
    content[position % len(content)] = byte
    (tmp_path / "a.safetensors").write_bytes(content)
    try:
        found = read_header(tmp_path / "a.safetensors")
        if CONFIG_KEY in found.metadata:
            parse_config(parse_json(found.metadata[CONFIG_KEY], "copy"), "copy")
    except ValueError as error:
        check_message(error)


def check_header(text: bytes, size: int) -> None:
    try:
        found = parse_header(text, size, "a.safetensors")
    except ValueError as error:
        check_message(error)
    else:
        assert isinstance(found, Header)
        assert sum(info.stop - info.start for info in found.tensors.values()) == size


def check_message(error: ValueError) -> None:
    assert len(str(error)) < 2_000
