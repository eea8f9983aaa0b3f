"""The package as a whole: who imports whom, what importing costs, documented names, docstring examples, docs."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import diffusers_linattn
from diffusers_linattn.weights import PROCESSORS


ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "diffusers_linattn"
# A module may import from its own layer and from those before it.
LAYERS = [
    {"layout", "version"},
    {"kernels"},
    {"ops", "models", "files", "generation", "layer_selection", "lora", "offloading"},
    {"tracker"},
    {"processors"},
    {"linearize"},
    {"set_attn_processor", "status", "samples"},
    {"sharing"},
    {"weights", "evaluation"},
    {"evaluate"},
    {"training"},
    {"choose_layers", "distill", "hub"},
    {"cli"},
    {"__init__", "__main__"},
]


def modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.walk_packages([str(SOURCE)], "diffusers_linattn.")]
    if importlib.util.find_spec("triton") is None:
        names = [
            name
            for name in names
            if not re.search(r"(linear|local)_attention_|gated_(?!attention)|linear_blocks|tile_addressing", name)
        ]
    return [importlib.import_module(name) for name in ["diffusers_linattn", *names]]


def layer_of(path: Path) -> int:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers_linattn."):
            imported = SOURCE / (node.module or "").split(".")[1]
            assert layer_of(imported) <= layer_of(path), f"{path.name} imports {node.module}"


def test_importing_takes_no_triton_no_network_and_leaves_the_random_state() -> None:
    code = """
import socket, sys, torch
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
sys.modules["triton"] = None
before = torch.random.get_rng_state()
import diffusers_linattn
assert torch.equal(torch.random.get_rng_state(), before)
assert sys.modules["triton"] is None
"""
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True, cwd=ROOT)


def test_public_names_are_sorted_documented_and_there() -> None:
    names = diffusers_linattn.__all__
    assert names == sorted(names)
    for name in [name for name in names if name != "__version__"]:
        documented = inspect.getdoc(getattr(diffusers_linattn, name))
        assert documented, name
        assert name == "TokenLayout" or "Example:" in documented or "Raises:" in documented, name


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_docstring_examples(module: ModuleType) -> None:
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_page_of_models_is_the_generated_one() -> None:
    path = ROOT / "docs" / "make_models_page.py"
    generator: dict[str, Any] = runpy.run_path(str(path))
    assert (ROOT / "docs" / "models.md").read_text() == generator["page"](), "run python docs/make_models_page.py"


def test_docs_name_every_mechanism() -> None:
    mechanisms = (ROOT / "docs" / "mechanisms.md").read_text()
    for cls in PROCESSORS.values():
        assert f"`{cls.__name__}`" in mechanisms


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_in_the_docs_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_source_files_stay_short() -> None:
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name
