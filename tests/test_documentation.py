"""What the pages of the documentation show, run in their order on a tiny FLUX with small numbers."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxPipeline
from hub_client import student, tiny_image
from hub_server import Hub
from safetensors.torch import save

from diffusers_linattn import push_linear_attention, save_linear_attention
from diffusers_linattn.cli import COMMANDS, main

import tiny
from test_clear_weights import POOLED, trained


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("README.md", "quickstart.md", "distillation.md", "evaluation.md", "samples.md", "sharing.md", "models.md")
NAMES = ("diffusers-linattn", "diffusers_linattn")  # of the program, and of the module of it
BASE = "black-forest-labs/FLUX.1-dev"

# What a page asks for, and what is enough to run it. Prompts of one word take as many tokens as any.
SMALLER = {
    '"cuda"': '"cpu"',
    "num_samples=10_000": "num_samples=12",
    "keep=0.5": "keep=0.5, steps=2",
    "num_images=64": "num_images=2",
    "num_inference_steps=28": "num_inference_steps=2",
    "transfer_steps=1_000": "transfer_steps=1",
    "steps=9_000": "steps=1",
    'distill(pipe, samples, "student/", b': 'distill(pipe, samples, "student/", transfer_steps=1, steps=1, b',
    "gradient_accumulation_steps=32": "gradient_accumulation_steps=1",
    '"gradient_accumulation_steps": 32': '"gradient_accumulation_steps": 1',
    '"max_sequence_length": 256': '"max_sequence_length": 8',
    "1024": "32",
    "2048": "32",
    "768": "24",
    "1344": "48",
    "window=16": "window=2",
    "window=32": "window=3",
    'metrics=["lpips", tones]': "metrics=[tones]",  # whose weights are downloaded
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def smaller(source: str) -> str:
    for large, small in SMALLER.items():
        source = re.sub(rf"(?<!\w){re.escape(large)}(?!\d)", small, source)
    return source


def pipeline() -> Any:
    pipe = tiny.flux_pipeline()
    pipe.register_to_config(_name_or_path=BASE)
    pipe.default_sample_size = 4
    return pipe


@pytest.fixture
def run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Runs Python as a reader would, with prompts, pictures and a Hub that has what is loaded from it."""

    def from_pretrained(name: str, **settings: Any) -> Any:
        assert name == BASE
        return pipeline().to(settings.pop("dtype"), **settings)

    monkeypatch.setattr(FluxPipeline, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("pictures").mkdir()
    tiny_image().save("pictures/cat.png")
    Path("pictures/cat.txt").write_text("a cat")
    push_linear_attention(student(), "me/flux-clear-w8")
    hub.create("Huage001/CLEAR", {POOLED: save(trained(4))})
    names: dict[str, Any] = {"pipe": student()}
    return lambda source: exec(compile(smaller(source), "<page>", "exec"), names)


@pytest.mark.parametrize("page", RUN)
def test_python_of_a_page(page: str, run: Callable[[str], None]) -> None:
    path = next(path for path in PAGES if path.name == page)
    if page == "evaluation.md":
        save_linear_attention(student(), "student")  # which the other pages make themselves
    for source in blocks(path, "python"):
        run(source)


def test_no_python_is_left_out() -> None:
    # A function of adding_a_model.md alone is a part of something larger.
    assert {path.name for path in PAGES if blocks(path, "python")} == {*RUN}


def test_the_flux_example(run: Callable[[str], None]) -> None:
    source = (ROOT / "examples" / "flux.py").read_text()
    assert len(source.splitlines()) <= 40
    run(source)
    assert Path("lighthouse.png").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for settings in blocks(page, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", settings)
        if name:
            Path(name[1]).write_text(settings)
    ran: list[argparse.Namespace] = []
    for name, add in list(COMMANDS.items()):
        monkeypatch.setitem(COMMANDS, name, lambda parser, add=add: (add(parser), ran.append)[1])
    lines = [line for shell in blocks(page, "bash") for line in shell.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if re.search(r"diffusers.linattn (?!\.)", line)]
    for command in commands:
        arguments = next(command[i + 1 :] for i, word in enumerate(command) if word in NAMES)
        assert main(arguments) == 0
    assert len(ran) == len(commands)
