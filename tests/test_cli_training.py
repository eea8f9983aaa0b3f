"""The command line from samples to a table, on tiny pipelines saved to folders."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub
from PIL import Image

import diffusers_linattn.cli.distill_command as distill_command
from diffusers_linattn import (
    ClearProcessor,
    DistillConfig,
    LinearProcessor,
    distill,
    evaluate,
    linearize,
    load_linear_attention,
)
from diffusers_linattn.cli import main
from diffusers_linattn.samples import Samples
from diffusers_linattn.weights import PROCESSORS

import tiny


def run(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == status, capsys.readouterr().err
    captured = capsys.readouterr()
    return captured.err.splitlines()[-1] if status else captured.out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional pipeline in a folder."""
    folder = tmp_path_factory.mktemp("dit")
    tiny.dit_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def samples(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples") / "made"
    arguments = ["--classes", "0-2,7", "--num-samples", "6", "--num-inference-steps", "2", "--guidance-scale", "1"]
    assert main(["samples", "--model", str(model), *arguments, "--output-dir", str(folder)]) == 0
    return folder


def test_from_samples_to_a_table(
    model: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Samples(samples)
    assert len(made) == 6
    assert [made.prompt_of(i) for i in range(6)] == [0, 1, 2, 7, 0, 1]
    flags = ["--processor", "clear", "--window", "2", "--down-factor", "2", "--layers", "transformer_blocks.0.*"]
    quick = ["--transfer-steps", "2", "--steps", "2", "--batch-size", "2", "--learning-rate", "1e-3", "--seed", "4"]
    common = ["--model", model, "--device", "cpu"]
    student = tmp_path / "student"
    text = run(capsys, "distill", *common, *flags, *quick, "--samples", samples, "--output-dir", student)
    assert f"Saved to {student}" in text
    # The same as the functions do.
    pipe = tiny.dit_pipeline()
    linearize(pipe, ClearProcessor(window=2, down_factor=2), layers=["transformer_blocks.0.*"])
    distill(pipe, samples, tmp_path / "other", transfer_steps=2, steps=2, batch_size=2, learning_rate=1e-3, seed=4)
    for name in ("linear_attention.safetensors", "linear_attention_config.json"):
        assert (student / name).read_bytes() == (tmp_path / "other" / name).read_bytes()

    shown = ["--samples", samples, "--num-images", "3", "--other-seed", "--output-dir", tmp_path / "evaluation"]
    table = run(capsys, "evaluate", *common, "--weights", student, *shown, "--num-inference-steps", "1")
    expected = evaluate(
        load_linear_attention(tiny.dit_pipeline(), student),
        samples=samples,
        num_images=3,
        other_seed=True,
        call_arguments={"num_inference_steps": 1},
    )
    assert table.strip() == expected.to_markdown() == (tmp_path / "evaluation" / "evaluation.md").read_text().strip()
    kept = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert kept["prompts"] == [0, 1, 2]
    assert kept["call_arguments"] == {"guidance_scale": 1.0, "num_inference_steps": 1}

    # An untrained swap, of given classes, and going on from what was trained.
    untrained = run(capsys, "evaluate", *common, "--processor", "linear", "--no-reset-projections", "--classes", "5,3")
    assert "| student |" in untrained
    more = ["--init", student, "--samples", samples, "--output-dir", tmp_path / "more"]
    run(capsys, "distill", *common, *more, "--transfer-steps", "0", "--steps", "1", "--batch-size", "2")
    layers = json.loads((tmp_path / "more" / "linear_attention_config.json").read_text())["layers"]
    assert list(layers) == ["transformer_blocks.0.attn1"]


def test_prompts_pictures_and_resolutions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.flux_pipeline().save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    common = ["--model", tmp_path / "flux", "--call", "max_sequence_length=8", "--resolution", "24x32"]
    made = ["--prompts", tmp_path / "prompts.txt", "--num-samples", "3", "--num-inference-steps", "1"]
    text = run(capsys, "samples", *common, "--resolution", "32x24", *made, "--output-dir", tmp_path / "made")
    assert text == f"3 samples in {tmp_path / 'made'}\n"
    samples = Samples(tmp_path / "made")
    assert {samples.resolution_of(i) for i in range(3)} <= {(24, 32), (32, 24)}
    assert [samples.prompt_of(i) for i in range(3)] == ["a cat", "a dog", "a cat"]
    (tmp_path / "pictures").mkdir()
    for name in ("one", "two"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text("the red cat")
    text = run(capsys, "samples", *common, "--images", tmp_path / "pictures", "--output-dir", tmp_path / "encoded")
    assert text == f"2 samples in {tmp_path / 'encoded'}\n"
    assert Samples(tmp_path / "encoded").prompt_of(1) == "the red cat"
    for source, flag in (
        (["--images", tmp_path / "pictures"], ["--guidance-scale", "2"]),
        (["--images", tmp_path / "pictures"], ["--num-samples", "2"]),
        (["--prompts", tmp_path / "prompts.txt"], ["--caption-column", "caption"]),
        (["--classes", "3"], ["--dataset-split", "test"]),
    ):
        refused = run(capsys, "samples", *common, *source, *flag, "--output-dir", tmp_path / "x", status=1)
        assert f"{flag[0]} has no meaning with {source[0]}" in refused
    for command in (["samples", "--output-dir", tmp_path / "x"], ["evaluate", "--processor", "clear"]):
        refused = run(capsys, *command, *common[:2], "--classes", "0-9", status=1)
        assert "FluxPipeline takes prompts, not classes: give --prompts FILE" in refused
    assert not (tmp_path / "x").exists()


VALUES: dict[str, tuple[list[str], Any]] = {
    "lr_scheduler_arguments": (['{"power": 2}'], {"power": 2}),
    "optimizer_arguments": (['{"weight_decay": 0.1}'], {"weight_decay": 0.1}),
    "validation_prompts": (["a cat", "3"], ("a cat", "3")),
    "validation_metrics": (["lpips", "fid"], ("lpips", "fid")),
    "report_to": (["tensorboard"], ("tensorboard",)),
    "trainable": (["lora"], "lora"),
    "timestep_sampling": (["logit_normal"], "logit_normal"),
    "mixed_precision": (["bf16"], "bf16"),
}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, samples: Path, model: Path) -> Any:
    """The settings and the processor that a command line stands for; nothing is trained."""

    def parse(*arguments: Any) -> tuple[DistillConfig, Any]:
        found: list[Any] = []
        # The settings are read; what would take long is what is left out.
        monkeypatch.setattr(distill_command, "distill", lambda pipe, samples, directory, config: found.append(config))
        monkeypatch.setattr(distill_command, "load_pipeline", lambda options: tiny.flux_pipeline())
        monkeypatch.setattr(distill_command, "convert", lambda pipe, processor, options: found.append(processor))
        places = ["--model", model, "--samples", samples, "--output-dir", "student"]
        assert main([str(argument) for argument in ["distill", *places, *arguments]]) == 0
        return found[1], found[0]

    return parse


def test_every_setting_has_a_flag(parsed: Any) -> None:
    defaults = DistillConfig()
    assert parsed("--processor", "linear")[0] == defaults
    flags, expected = ["--processor", "linear"], {}
    for field in dataclasses.fields(DistillConfig):
        flag, default = f"--{field.name.replace('_', '-')}", getattr(defaults, field.name)
        if field.name in VALUES:
            words, expected[field.name] = VALUES[field.name]
            flags += [flag, *words]
        elif isinstance(default, bool):
            flags += [f"--no-{flag[2:]}" if default else flag]
            expected[field.name] = not default
        elif isinstance(default, int | float):
            flags += [flag, str(default / 2 if isinstance(default, float) else default + 1)]
            expected[field.name] = default / 2 if isinstance(default, float) else default + 1
        else:
            flags += [flag, "3" if default is None else f"{default}x"]
            kind = str(field.type)
            expected[field.name] = f"{default}x" if default else (0.3 if "float" in kind else 3)
            if default is None and "float" in kind:
                flags[-1] = "0.3"
    config, _ = parsed(*flags)
    assert dataclasses.asdict(config) == expected
    config, _ = parsed("--processor", "linear", "--max-grad-norm", "none", "--resume-from-checkpoint", "none")
    assert config.max_grad_norm is None
    assert config.resume_from_checkpoint is None


@pytest.mark.parametrize("kind", PROCESSORS)
def test_every_argument_of_a_processor_has_a_flag(kind: str, parsed: Any) -> None:
    cls = PROCESSORS[kind]
    assert parsed("--processor", kind)[1].to_config() == cls().to_config()
    changed: dict[str, Any] = {}
    for name, default in cls().to_config().items():
        if isinstance(default, bool):
            changed[name] = not default
        elif isinstance(default, int):
            changed[name] = default + 2
        elif name == "impl":
            changed[name] = "reference"
        elif name == "feature_map":
            changed[name] = "softmax"
        elif name == "direction":
            changed[name] = "alternate"
        elif name == "gates":
            changed[name] = "scalar"
        else:
            assert default is None, name
            changed[name] = 2
    flags = []
    for name, value in changed.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    assert parsed("--processor", kind, *flags)[1].to_config() == changed


def test_settings_from_a_file_and_flags_over_them(parsed: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "processor: linear\nfeature-map: hedgehog\nlearning_rate: 1e-3\nsteps: 7\ngradient_checkpointing: true\n"
        "max_grad_norm: null\nvalidation_steps: 4\nvalidation_prompts: [a cat, the dog]\n"
        "optimizer_arguments: {betas: [0.9, 0.95]}\nlayers: [transformer_blocks.*]\nresume_from_checkpoint: none\n"
    )
    config, processor = parsed("--config", file, "--steps", "9")
    assert config == DistillConfig(
        learning_rate=1e-3,
        steps=9,
        gradient_checkpointing=True,
        max_grad_norm=None,
        validation_steps=4,
        validation_prompts=("a cat", "the dog"),
        optimizer_arguments={"betas": [0.9, 0.95]},
        resume_from_checkpoint=None,
    )
    assert processor.to_config() == LinearProcessor(feature_map="hedgehog").to_config()
    assert parsed("--config", file, "--no-gradient-checkpointing")[0].gradient_checkpointing is False
    (tmp_path / "run.json").write_text('{"processor": "clear", "window": 5}')
    assert parsed("--config", tmp_path / "run.json")[1].window == 5
    assert parsed(f"--config={tmp_path / 'run.json'}", "--window=6")[1].window == 6


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("proccessor: linear", "'proccessor' is no setting of this command. Did you mean processor?"),
        ("- a\n- b", "holds a list, expected names of flags and their values"),
        ("a: [", "is not valid YAML"),
        ("gradient_checkpointing: 3", "gradient_checkpointing is 3, expected true or false"),
        ("steps: true", "steps is True, which this flag does not take"),
        ("steps: [1, 2]", "steps is a list, expected one value"),
        ("config: other.yaml", "'config' is no setting of this command"),
    ],
)
def test_files_of_settings_that_make_no_sense(
    content: str, match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert main(["distill", "--config", str(tmp_path / "run.yaml")]) == 1
    assert match in capsys.readouterr().err
    (tmp_path / "run.yaml").write_bytes("steps: 3  # höher\n".encode("latin-1"))
    assert "run.yaml is not UTF-8: save it as such" in run(
        capsys, "distill", "--config", tmp_path / "run.yaml", status=1
    )
    assert "does not exist" in run(capsys, "distill", "--config", tmp_path / "none.yaml", status=1)
    (tmp_path / "run.yaml").write_text("steps: many\n")
    with pytest.raises(SystemExit) as caught:
        main(["distill", "--config", str(tmp_path / "run.yaml")])
    assert caught.value.code == 2
    assert "argument --steps: invalid int value: 'many'" in capsys.readouterr().err


def test_errors_are_explained_before_a_model_is_loaded(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--model", tmp_path / "no-model", "--samples", samples, "--output-dir", tmp_path / "out"]
    for arguments, message in (
        (["--processor", "linear", "--window", "3"], "--window is not an argument of LinearProcessor"),
        (["--processor", "clear", "--window", "0"], "window must be"),
        (["--init", "me/it", "--window", "3"], "--window goes with --processor"),
        (["--init", "me/it", "--layers", "a.*"], "--layers goes with --processor"),
        (["--processor", "clear", "--weight-name", "x"], "leave one of them out"),
        (["--processor", "clear", "--steps", "-1"], "steps must be"),
        (["--processor", "clear", "--rank", "8"], "--rank is that of a LoRA, and --trainable is attention"),
        (["--processor", "clear", "--samples", tmp_path / "no"], "manifest.json does not exist"),
    ):
        assert message in run(capsys, "distill", *places, *arguments, status=1)
    assert "no-model" in run(capsys, "distill", *places, "--processor", "clear", status=1)
    evaluation = ["evaluate", "--model", "x", "--processor", "clear"]
    assert "No prompts" in run(capsys, *evaluation, status=1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    for item in ("three", "a-b=1", "a=b"):
        assert f"--call {item}" in run(capsys, *evaluation, "--call", item, status=1).replace(
            "--call needs NAME=VALUE, got ", "--call "
        ).replace("'", "", 2)
    for arguments in (
        ["distill", *places],  # no processor
        ["distill", *places, "--processor", "clear", "--init", "me/it"],
        ["distill", *places, "--processor", "clear", "--step", "3"],  # no abbreviations
        ["samples", "--model", "x", "--classes", "9-3", "--output-dir", "y"],
        ["samples", "--model", "x", "--classes", "0-9", "--output-dir", "y", "--resolution", "1024"],
        ["evaluate", "--model", "x", "--processor", "clear", "--metrics", "beauty"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        assert caught.value.code == 2
    capsys.readouterr()
    for flag, hint in (
        ("--learning_rate=1e-3", " Did you mean --learning-rate?"),
        ("--windw", " Did you mean --window?"),
        ("--xyzzy", ""),
        ("4", ""),
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in ["distill", *places, "--processor", "clear", flag, "4"]])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("usage: diffusers-linattn distill --model ID_OR_PATH")
        assert error.endswith(f"error: unrecognized arguments: {flag} 4.{hint}\n")
    absent = "xpu" if torch.cuda.is_available() else "cuda"
    for device in (absent, f"{absent}:1"):
        refused = run(capsys, "distill", *places, "--processor", "clear", "--device", device, status=1)
        assert f"--device {device}: torch {torch.__version__} finds no {absent} in this machine. Give cpu" in refused
    assert not (tmp_path / "out").exists()


def test_a_result_is_published_where_that_is_possible(
    model: Path, samples: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--processor", "linear", "--transfer-steps", "1", "--steps", "0", "--batch-size", "2", "--device", "cpu"]
    places = ["--samples", samples, "--output-dir", tmp_path / "student"]
    # Known before the model is loaded.
    for repo, message in (("you/it", "me cannot push to you/it"), ("a--b", "is not the id of a repository")):
        arguments = ["--model", tmp_path / "no-model", *places, *quick, "--push-to-hub", repo]
        assert message in run(capsys, "distill", *arguments, status=1)
    text = run(capsys, "distill", "--model", model, *places, *quick, "--push-to-hub", "me/it")
    assert f"{hub.endpoint}/me/it/commit/" in text
    assert {"linear_attention.safetensors", "README.md"} < set(hub.files("me/it"))


def test_the_help_of_every_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("samples", "distill", "evaluate", "push", "pull", "info"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert text.startswith(f"usage: diffusers-linattn {command}")
        if command in ("distill", "evaluate"):
            assert "cut at the border (default: clear 16, hybrid 8)" in text
            assert '"alternate" is DiG\'s own form' in text
            assert "That part is quadratic in the tokens (default: 1)" in text
            assert "projections afresh instead of inheriting them (default: off)" in text


def test_an_interrupted_command_returns_130(monkeypatch: pytest.MonkeyPatch, capsys: Any, samples: Path) -> None:
    def interrupted(options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(distill_command, "load_pipeline", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["--model", "x", "--processor", "clear", "--samples", str(samples), "--output-dir", "y"]
    assert main(["distill", *arguments]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "diffusers-linattn distill: Stopped."
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.weekly), signal.SIGINT])
def test_a_stopped_training_saves_a_checkpoint_and_goes_on(
    model: Path, samples: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def command(directory: str, steps: int = 60) -> list[str]:
        flags = ["--transfer-steps", "4", "--steps", str(steps), "--batch-size", "2", "--processor", "linear"]
        places = ["--model", model, "--samples", samples, "--output-dir", tmp_path / directory]
        return [sys.executable, "-m", "diffusers_linattn", "distill", *map(str, places), *flags]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(command("broken"), stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert list((tmp_path / "broken").glob("checkpoint-*"))
    assert not (tmp_path / "broken" / "linear_attention.safetensors").exists()
    subprocess.run(command("broken"), check=True, capture_output=True, timeout=300)
    weights = [(tmp_path / name / "linear_attention.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_under_accelerate_launch_and_in_two_processes(model: Path, samples: Path, tmp_path: Path) -> None:
    one = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    # accelerate's own launcher starts several processes on CPUs through MPI alone.
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    module = ["-m", "diffusers_linattn", "distill", "--model", str(model), "--processor", "linear"]
    flags = ["--samples", str(samples), "--transfer-steps", "2", "--steps", "2"]
    for launcher, batch, name in ((one, "2", "one"), (two, "1", "two")):
        command = [*launcher, *module, *flags, "--batch-size", batch, "--output-dir", str(tmp_path / name)]
        env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=env)
        assert result.stdout.count("Saved to") == 1
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 4
    for row, other in zip(map(json.loads, rows[0]), map(json.loads, rows[1]), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
