"""The examples run: on the pipeline in the repository, with small numbers."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["clear", "linear", "gla"])
def test_quickstart(processor: str, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "quickstart.py", "--output", tmp_path, "--processor", processor]
    numbers = {"--samples": 26, "--transfer-steps": 20, "--steps": 4, "--batch-size": 4, "--pictures": 8}
    arguments = [str(part) for item in numbers.items() for part in item]
    subprocess.run([*map(str, command), *arguments], check=True, cwd=tmp_path)
    table = json.loads((tmp_path / "quickstart.json").read_text())
    assert list(table) == ["original", "swapped", "distilled"]
    assert table["original"]["latent_mse"] == 0
    # So few steps do not bring every number closer, but the pictures already resemble letters more.
    assert table["distilled"]["frechet"] < table["swapped"]["frechet"]
    assert table["swapped"]["ssim"] < table["distilled"]["ssim"] < 1
    assert (tmp_path / "quickstart.png").stat().st_size > 1000
    assert (tmp_path / "student" / "linear_attention.safetensors").exists()


def test_the_flux_example_is_short_and_parses() -> None:
    source = (EXAMPLES / "flux.py").read_text()
    ast.parse(source)
    assert len(source.splitlines()) <= 40


def test_the_pipeline_in_the_repository_is_small() -> None:
    size = sum(path.stat().st_size for path in (EXAMPLES / "glyphs").rglob("*") if path.is_file())
    assert size < 10e6
