"""The examples run: on the pipeline in the repository, with small numbers."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from diffusers_linattn import ClearProcessor, load_linear_attention
from diffusers_linattn.evaluation.pictures import call_of
from diffusers_linattn.samples import Samples

import tiny


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    "processor", ["linear", *(pytest.param(name, marks=pytest.mark.weekly) for name in ("clear", "gla", "hybrid"))]
)
def test_quickstart(processor: str, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "quickstart.py", "--output", tmp_path, "--processor", processor]
    numbers = {"--samples": 13, "--transfer-steps": 20, "--steps": 4, "--batch-size": 4, "--pictures": 4}
    arguments = [str(part) for item in numbers.items() for part in item]
    subprocess.run([*map(str, command), *arguments], check=True, cwd=tmp_path)
    table = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert set(table) == {"reference", "swapped", "distilled"}
    assert table["reference"]["latent_mse"] == 0
    # So few steps do not bring every number closer, but the pictures already resemble letters more.
    assert table["distilled"]["frechet"] < table["swapped"]["frechet"]
    assert table["swapped"]["ssim"] < table["distilled"]["ssim"] < 1
    assert (tmp_path / "grid.png").stat().st_size > 1000
    assert (tmp_path / "student" / "linear_attention.safetensors").exists()


@pytest.mark.slow
def test_quickstart_can_be_repeated_and_asked_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main = runpy.run_path(str(EXAMPLES / "quickstart.py"))["main"]

    def run(flags: str) -> str:
        numbers = "--samples 4 --transfer-steps 1 --steps 1 --batch-size 2 --pictures 2"
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *flags.split(), *numbers.split()])
        main()
        return capsys.readouterr().out

    weights = tmp_path / "quickstart-clear" / "student" / "linear_attention.safetensors"
    table = run("--processor clear --window 4")
    written = weights.stat().st_mtime_ns
    assert run("--processor clear --window 4") == table
    assert weights.stat().st_mtime_ns == written  # the finished student is loaded
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear all")
    drawn = (tmp_path / "quickstart-clear" / "grid.png").stat().st_mtime_ns
    for flags, message in (
        ("--processor clear --window 3", "quickstart-clear holds a run with window=4: give another folder"),
        ("--output mine", "mine holds something else"),
    ):
        with pytest.raises(SystemExit):
            run(flags)
        assert message in capsys.readouterr().err
    assert (tmp_path / "quickstart-clear" / "grid.png").stat().st_mtime_ns == drawn
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("name", ["pipeline", "pixart_pipeline"])
def test_a_pipeline_in_the_repository_is_small(name: str) -> None:
    size = sum(path.stat().st_size for path in (EXAMPLES / "glyphs" / name).rglob("*") if path.is_file())
    assert 1e6 < size < 10e6


@pytest.mark.slow
def test_distill_stopped_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """In the manner of the scripts of diffusers: checkpoints, at most so many, and resuming from the latest."""
    tiny.flux_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nthe red letter\n")

    def command(output: str) -> list[str]:
        flags: dict[str, Any] = {
            "pretrained_model_name_or_path": tmp_path / "pipeline",
            "prompts": tmp_path / "prompts.txt",
            "output_dir": tmp_path / output,
            "num_samples": 4,
            "height": 24,
            "width": 32,
            "num_inference_steps": 2,
            "processor": "clear",
            "window": 2,
            "down_factor": 2,
            "train_batch_size": 2,
            "transfer_steps": 6,
            "max_train_steps": 16,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 2,
            "checkpointing_steps": 4,
            "checkpoints_total_limit": 1,
            "validation_prompt": "a cat",
            "validation_steps": 12,
            "num_images": 2,
        }
        given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        return [sys.executable, str(EXAMPLES / "distill.py"), "--gradient_checkpointing", *given]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=500)
    student = tmp_path / "broken" / "student"
    process = subprocess.Popen(command("broken"), stderr=subprocess.PIPE, text=True)
    while not (student / "metrics.jsonl").exists() or len((student / "metrics.jsonl").read_text().splitlines()) < 10:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    (checkpoint,) = student.glob("checkpoint-*")
    number = int(checkpoint.name.split("-")[1])
    assert number == len((student / "metrics.jsonl").read_text().splitlines()) >= 10
    assert {path.name for path in checkpoint.iterdir()} >= {"trained.safetensors", "optimizer.bin", "position.json"}
    assert not (student / "linear_attention.safetensors").exists()
    result = subprocess.run(command("broken"), check=True, capture_output=True, text=True, timeout=500)
    assert "| student |" in result.stdout
    weights = [
        (tmp_path / name / "student" / "linear_attention.safetensors").read_bytes() for name in ("whole", "broken")
    ]
    assert weights[0] == weights[1]
    assert not list(student.glob("checkpoint-*"))
    for name in ("whole", "broken"):
        folder = tmp_path / name
        assert Image.open(folder / "student" / "validation" / "step-000012.png").height > 24
        assert {path.name for path in (folder / "evaluation").iterdir()} == {
            "evaluation.json",
            "evaluation.md",
            "grid.png",
        }
    assert call_of(Samples(tmp_path / "whole" / "samples"))["height"] == 24
    pipe = load_linear_attention(tiny.flux_pipeline(), student)
    with torch.no_grad():
        assert pipe.transformer(**tiny.flux_inputs())[0].isfinite().all()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--learning_rate", "0"], "learning_rate must be a number above 0"),
        (["--validation_prompt", "a cat"], "validation_prompts are not used without validation_steps"),
        (["--layers", "blocks.*"], "blocks"),
    ],
)
def test_settings_that_make_no_sense_are_found_before_samples_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], match: str
) -> None:
    tiny.flux_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    paths = {"pretrained_model_name_or_path": "pipeline", "prompts": "prompts.txt", "output_dir": "output"}
    given = [part for name, file in paths.items() for part in (f"--{name}", str(tmp_path / file))]
    monkeypatch.setattr(sys, "argv", ["distill.py", *given, *flags])
    main = runpy.run_path(str(EXAMPLES / "distill.py"))["main"]
    try:
        with pytest.raises(ValueError, match=match):
            main()
    finally:
        PartialState._reset_state()
    assert not (tmp_path / "output").exists()


def test_the_training_example_is_short_and_explains_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EXAMPLES / "distill.py"
    assert len(path.read_text().splitlines()) < 180
    parse_args = runpy.run_path(str(path))["parse_args"]
    needed = ["distill.py", "--pretrained_model_name_or_path", "x", "--prompts", "y"]
    for arguments, status, message in (
        ("--help", 0, "accelerate launch examples/distill.py"),
        ("--push_to_hub", 2, "--push_to_hub needs --hub_model_id"),
        ("--height 24", 2, "--height and --width go together"),
        ("--width 24 --processor gla", 2, "--height and --width go together"),
        ("--processor linear --down_factor 2", 2, "--down_factor does not go with --processor linear"),
        ("--processor gla --window 8", 2, "--window does not go with --processor gla"),
        ("--processor hybrid --window 8 --down_factor 2", 2, "--down_factor does not go with --processor hybrid"),
    ):
        monkeypatch.setattr(sys, "argv", [*needed, *arguments.split()])
        with pytest.raises(SystemExit) as stopped:
            parse_args()
        assert stopped.value.code == status
        assert message in "".join(capsys.readouterr())
    monkeypatch.setattr(sys, "argv", [*needed, "--processor", "clear", "--window", "3"])
    assert parse_args().template.to_config() == ClearProcessor(window=3).to_config()
