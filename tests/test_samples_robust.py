"""Samples against everything that can happen to a long run: kills, damage, other processes, other settings."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples_process
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from peft import LoraConfig
from samples_process import CALL, PROMPTS
from test_compatibility_offloading import OFFLOADS

import diffusers_linattn.samples.plan as plan
from diffusers_linattn import LinearProcessor, distill, linearize, make_samples, restore
from diffusers_linattn.samples import Samples
from diffusers_linattn.samples.fingerprint import fingerprint
from diffusers_linattn.samples.shards import read_shard
from diffusers_linattn.training.objective import FlowMatching, objective_of

import tiny


HERE = Path(__file__).parent


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("samples") / "whole"
    samples_process.run(directory)
    return directory


def environment() -> dict[str, str]:
    source = str(Path(plan.__file__).parents[2])
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([source, str(HERE)])}


@pytest.fixture(scope="module")
def start() -> Any:
    """Starts a process that makes samples, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["samples_process"])

    def start(directory: Path) -> Any:
        process = context.Process(target=samples_process.run, args=(directory,))
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        process = context.Process(target=len, args=("",))
        process.start()
        wait(process)  # until everything is imported
    return start


def wait(process: Any) -> None:
    process.join(timeout=240)
    assert process.exitcode == 0


def test_a_directory_holds_samples_and_nothing_else(whole: Path) -> None:
    names = [*(f"samples-{i:05d}.safetensors" for i in range(7)), "manifest.json", "settings.json"]
    assert sorted(content(whole)) == sorted(
        [*names, "conditioning-00000.safetensors", "conditioning-00001.safetensors"]
    )
    assert len(Samples(whole)) == 20
    record = read_shard(whole / "samples-00001.safetensors").record["samples"][0]
    assert record == {
        "index": 3,
        "prompt": "red letter",
        "seed": record["seed"],
        "resolution": record["resolution"],
        "guidance_scale": 3.5,
    }


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(whole: Path, tmp_path: Path, start: Any) -> None:
    directory = tmp_path / "killed"
    chance = random.Random(5)
    kills = 0
    while True:
        there = len(list(directory.glob("*.*")))
        process = start(directory)
        # Killed soon after the next file: every run gets further, on a machine of any speed.
        while process.is_alive() and len(list(directory.glob("*.*"))) <= there:
            process.join(0.001)
        process.join(chance.uniform(0, 0.03))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 3
    assert content(directory) == content(whole)


def test_what_a_killed_process_leaves_is_removed(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "killed"
    shutil.copytree(whole, directory)
    (directory / ".work").mkdir()
    for name in ("manifest.json", "samples-00002.safetensors", "conditioning-00001.safetensors"):
        (directory / ".work" / name).mkdir()
        (directory / name).rename(directory / ".work" / name / f".{name}.abc123")
        (directory / ".work" / f"{name}.lock").touch()
    samples_process.run(directory)
    assert content(directory) == content(whole)


@pytest.mark.slow
def test_two_processes_share_the_work(whole: Path, tmp_path: Path, start: Any) -> None:
    processes = [start(tmp_path / "shared") for _ in range(3)]
    for process in processes:
        wait(process)
    assert content(tmp_path / "shared") == content(whole)


@pytest.mark.slow
def test_accelerate_launch(whole: Path, tmp_path: Path) -> None:
    env = {**os.environ, **environment()}
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--mixed_precision", "no"]
    command = [sys.executable, *launch, str(HERE / "samples_process.py"), str(tmp_path / "launched")]
    result = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "launched") == content(whole)
    assert "samples: 100%" in result.stderr


def test_damage_is_found_reported_and_repaired(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MAX_PER_SHARD", 3)
    directory = tmp_path / "damaged"
    shutil.copytree(whole, directory)
    truncated, altered = directory / "samples-00003.safetensors", directory / "conditioning-00000.safetensors"
    os.truncate(truncated, truncated.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"samples-00003.safetensors is missing or altered"):
        Samples(directory)
    with altered.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\1\2\3")
    with pytest.raises(ValueError, match=r"conditioning-00000.safetensors is missing or altered"):
        Samples(directory)
    pipe = tiny.flux_pipeline(guidance_embeds=True)
    with pytest.warns(UserWarning, match="is truncated or altered: it is made again") as caught:
        make_samples(pipe, PROMPTS, directory, **CALL)
    assert [Path(str(warning.message).split(" is truncated")[0]) for warning in caught] == [altered, truncated]
    assert content(directory) == content(whole)
    # A record that says something else, and a whole file of another directory.
    text = truncated.read_bytes()
    assert b"a dog" in text
    truncated.write_bytes(text.replace(b"a dog", b"a DOG"))
    with pytest.raises(ValueError, match="missing or altered"):
        Samples(directory)
    shutil.copy(directory / "samples-00002.safetensors", truncated)
    with pytest.raises(ValueError, match="missing or altered"):
        Samples(directory)


def test_an_interrupted_run_goes_on_without_making_anything_twice(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.flux_pipeline(guidance_embeds=True)
    original, made = type(pipe).__call__, []

    @functools.wraps(original)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(kwargs.get("output_type") == "latent" and len(kwargs["prompt"]))
        if sum(made) > 7:
            made.pop()
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(plan, "MAX_PER_SHARD", 3)
    monkeypatch.setattr(type(pipe), "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        make_samples(pipe, PROMPTS, tmp_path, **CALL)
    with pytest.raises(ValueError, match=r"manifest.json does not exist: .* Run make_samples \(again\)"):
        Samples(tmp_path)
    first = len(list(tmp_path.glob("samples-*")))
    made.clear()

    @functools.wraps(original)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(len(kwargs["prompt"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", counting)
    make_samples(pipe, PROMPTS, tmp_path, **CALL)
    assert first == 2
    assert sum(made) == 20 - 3 * first  # no prompt was read again, no short run was made
    assert content(tmp_path) == content(whole)
    made.clear()
    make_samples(pipe, PROMPTS, tmp_path, **CALL)
    assert not made


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seed": 1}, r"other settings \(seed\)"),
        ({"num_samples": 21}, r"other settings \(num_samples\)"),
        ({"resolutions": [(24, 32)]}, r"other settings \(resolutions\)"),
        ({"num_inference_steps": 4}, r"other settings \(call_arguments\)"),
        ({"prompts": ["a cat"]}, r"other settings \(prompts\)"),
    ],
)
def test_other_settings_are_refused(whole: Path, tmp_path: Path, changes: Any, match: str) -> None:
    directory = tmp_path / "samples"
    shutil.copytree(whole, directory)
    pipe = tiny.flux_pipeline(guidance_embeds=True)
    call = {"prompts": PROMPTS, **CALL, **changes}
    with pytest.raises(ValueError, match=match):
        make_samples(pipe, call.pop("prompts"), directory, **call)
    assert content(directory) == content(whole)


def test_other_models_are_refused(whole: Path, tmp_path: Path) -> None:
    for pipe, match in (
        (tiny.flux_pipeline(), "transformer_config with guidance_embeds=True, the pipeline's has False"),
        (tiny.flux_pipeline(guidance_embeds=True).to(torch.bfloat16), "dtype was float32, now bfloat16"),
        (tiny.sd3_pipeline(), "pipeline was FluxPipeline, now StableDiffusion3Pipeline"),
    ):
        with pytest.raises(ValueError, match=match):
            make_samples(pipe, PROMPTS, whole, **CALL)
    Samples(whole).check_fits(tiny.flux_pipeline(guidance_embeds=True).to(torch.bfloat16))
    with pytest.raises(ValueError, match="guidance_embeds=True, the pipeline's has False"):
        Samples(whole).check_fits(tiny.flux_pipeline())
    with pytest.raises(ValueError, match="holds samples of a FluxTransformer2DModel, the pipeline has a SD3Tran"):
        Samples(whole).check_fits(tiny.sd3_pipeline())


def nudged(pipe: Any) -> Any:
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.001)
    return pipe


def test_samples_of_other_weights_are_refused(whole: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    for name in ("manifest.json", "samples-00001.safetensors"):
        (half / name).unlink()
    before = content(half)
    pipe = nudged(tiny.flux_pipeline(guidance_embeds=True))
    for directory in (whole, half):
        with pytest.raises(ValueError, match=r"samples of a model with other weights: in proj_out.weight it has \["):
            make_samples(pipe, PROMPTS, directory, **CALL)
    assert content(half) == before
    with pytest.raises(ValueError, match="with other weights: in proj_out.weight"):
        distill(linearize(pipe, LinearProcessor()), whole, tmp_path / "student", batch_size=2, steps=1)
    assert not (tmp_path / "student").exists()


def as_student(pipe: Any) -> Any:
    return tiny.train(linearize(pipe, LinearProcessor(reset_projections=True)))


FORMS: dict[str, Callable[[Any, Path], Any]] = {
    "bf16": lambda pipe, _: pipe.to(torch.bfloat16),
    "fp16": lambda pipe, _: pipe.to(torch.float16),
    "bf16 and back": lambda pipe, _: pipe.to(torch.bfloat16).to(torch.float32),
    "stored in fp8": lambda pipe, _: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "student": lambda pipe, _: as_student(pipe),
    "student in bf16": lambda pipe, _: as_student(pipe).to(torch.bfloat16),
    "restored": lambda pipe, _: restore(as_student(pipe)),
    "fused projections": lambda pipe, _: pipe.transformer.fuse_qkv_projections(),
    "LoRA beside": lambda pipe, _: pipe.transformer.add_adapter(LoraConfig(target_modules=["to_q", "proj_out"])),
    **{
        f"offload: {name}": lambda pipe, folder, offload=offload: offload(pipe.transformer, folder)
        for name, offload in OFFLOADS.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_fit_the_model_that_made_them_in_any_form(whole: Path, tmp_path: Path, form: str) -> None:
    pipe = tiny.flux_pipeline(guidance_embeds=True)
    FORMS[form](pipe, tmp_path)
    Samples(whole).check_fits(pipe)


def test_the_fingerprint_is_of_the_original_weights(tmp_path: Path) -> None:
    model = tiny.flux()
    expected = fingerprint(model)
    assert set(expected) == {name for name, _ in model.named_parameters()}
    weight = model.proj_out.weight.flatten()
    assert expected["proj_out.weight"] == weight[:: (weight.numel() - 1) // 3][:4].tolist()
    tiny.train(linearize(model, LinearProcessor(reset_projections=True)))
    model.fuse_qkv_projections()
    assert fingerprint(model) == expected
    model.add_adapter(LoraConfig(target_modules=["to_k", "proj_out"]))
    assert fingerprint(model) == expected
    for offload, same in (("group leaf", True), ("group leaf to disk", False), ("sequential", False)):
        model = tiny.flux()
        OFFLOADS[offload](model, tmp_path)
        assert fingerprint(model) == (expected if same else {})


def test_directories_without_a_fingerprint_go_on(whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "earlier"
    shutil.copytree(whole, directory)
    for name in ("settings.json", "manifest.json"):
        text = json.loads((directory / name).read_text())
        del text["settings"]["model"]["weights"]
        (directory / name).write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    before = content(directory)
    Samples(directory).check_fits(nudged(tiny.flux_pipeline(guidance_embeds=True)))
    for name in ("manifest.json", "samples-00001.safetensors"):
        (directory / name).unlink()
    samples_process.run(directory)
    assert content(directory) == before


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler])
def test_samples_fit_wherever_training_has_the_same_objective(whole: Path, scheduler: Any) -> None:
    pipe = tiny.flux_pipeline(guidance_embeds=True)
    pipe.scheduler = scheduler(use_flow_sigmas=True)  # its prediction_type still says epsilon
    assert isinstance(objective_of(pipe), FlowMatching)
    Samples(whole).check_fits(pipe)
    pipe.scheduler = scheduler()
    assert not isinstance(objective_of(pipe), FlowMatching)
    with pytest.raises(ValueError, match=rf"the pipeline has a {scheduler.__name__} \(epsilon\)"):
        Samples(whole).check_fits(pipe)


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    pipe = tiny.flux_pipeline(guidance_embeds=True)
    with pytest.raises(ValueError, match=r"holds notes.txt and no samples: give an empty directory"):
        make_samples(pipe, PROMPTS, tmp_path, **CALL)
    with pytest.raises(ValueError, match=r"notes.txt is a file, expected a directory"):
        make_samples(pipe, PROMPTS, tmp_path / "notes.txt", **CALL)
    assert sorted(content(tmp_path)) == ["notes.txt"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({"format_version": 1}))
    with pytest.raises(ValueError, match=r"has format_version 1, expected 2: make the samples again"):
        Samples(tmp_path / "old")


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for number in (20, 10**12):
        call = {**CALL, "num_samples": number}
        with pytest.raises(ValueError, match=r"needs about .* GB more, but the disk has 0.00 GB left"):
            make_samples(tiny.flux_pipeline(guidance_embeds=True), PROMPTS, tmp_path / "samples", **call)
    assert not (tmp_path / "samples").exists()


def test_the_number_of_processes_and_the_batch_change_nothing_but_rounding(whole: Path, tmp_path: Path) -> None:
    other = make_samples(
        tiny.flux_pipeline(guidance_embeds=True), PROMPTS, tmp_path / "other", **{**CALL, "batch_size": 1}
    )
    samples = Samples(whole)
    for group in samples.groups:
        torch.testing.assert_close(samples.batch(group).latents, other.batch(group).latents, atol=1e-5, rtol=0)
