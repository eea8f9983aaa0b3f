"""The command line against a Hub on 127.0.0.1."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import REPO, environment, output, push, student, tiny_image
from hub_server import Hub
from safetensors.torch import save_file

from diffusers_linattn import load_linear_attention, save_linear_attention
from diffusers_linattn.cli import main
from diffusers_linattn.sharing.checkpoint import WEIGHTS_NAME
from diffusers_linattn.sharing.saved_config import CONFIG_NAME

import tiny
from test_clear_weights import trained


def run(capsys: pytest.CaptureFixture[str], *arguments: Any, status: int = 0) -> str:
    assert main([str(argument) for argument in arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def test_push_info_and_pull(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = student()
    save_linear_attention(pipe, tmp_path / "student", max_shard_size="1KB", metrics={"FID": 9.5}, recipe={"steps": 3})
    tiny_image().save(tmp_path / "cat.png")
    (tmp_path / "student" / "checkpoint.pt").write_bytes(b"not for others")
    picture = f"a cat, one = two={tmp_path / 'cat.png'}"
    url = run(capsys, "push", tmp_path / "student", REPO, "--private", "--message", "First", "--image", picture)
    assert url.startswith(hub.endpoint)
    assert hub.repos[REPO].private
    assert hub.repos[REPO].messages == ["initial commit", "First"]
    assert b"a cat, one = two" in hub.files(REPO)["README.md"]
    assert "checkpoint.pt" not in hub.files(REPO)

    hub.log.clear()
    text = run(capsys, "info", REPO)
    commit = hub.repos[REPO].refs["main"]
    assert f"{REPO} at {commit}" in text
    assert "for         FluxTransformer2DModel of black-forest-labs/FLUX.1-dev" in text
    assert "4 layers: ClearProcessor(window=2, down_factor=2" not in text  # one of them has a weight replaced
    assert "3 layers: ClearProcessor(window=2, down_factor=2" in text
    assert "5 tensors of 1,040 parameters (F32)" in text
    assert 'recipe      {"steps": 3}' in text
    assert 'metric      "FID" 9.5' in text
    # Of the weights, the first bytes alone were asked for.
    weights = {f"/{oid}" for oid in hub.blobs}
    asked = [path for method, path in hub.log if method == "GET" and path in weights]
    assert len(asked) == len([name for name in hub.files(REPO) if name.endswith(".safetensors")])
    assert not list((tmp_path / "cache").rglob("snapshots/**/*.safetensors"))

    hub.answers_ranges = False
    assert run(capsys, "info", REPO) == text

    printed = run(capsys, "pull", REPO, "--output", tmp_path / "pulled").strip()
    assert printed == str(tmp_path / "pulled")
    for path in (tmp_path / "pulled").iterdir():
        assert path.read_bytes() == (tmp_path / "student" / path.name).read_bytes()
    assert torch.equal(output(load_linear_attention(tiny.flux(), tmp_path / "pulled")), output(pipe))
    cached = Path(run(capsys, "pull", REPO, "--revision", commit).strip())
    assert cached.name == commit
    assert (cached / CONFIG_NAME).exists()
    assert "3 layers" in run(capsys, "info", cached)
    save_linear_attention(student(seed=5), tmp_path / "student")
    assert "discussions/1" in run(capsys, "push", tmp_path / "student", REPO, "--create-pr")


def test_info_of_a_file_of_clear(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "clear_local_16_down_4.safetensors"
    save_file(trained(4), tmp_path / name)
    hub.create("Huage001/CLEAR", {name: (tmp_path / name).read_bytes()})
    text = run(capsys, "info", "Huage001/CLEAR", "--weight-name", name)
    assert "2 layers: ClearProcessor(window=16, down_factor=4" in text
    assert "black-forest-labs/FLUX.1-dev" in text
    assert "written by  the authors of CLEAR" in text
    assert torch.equal(
        output(load_linear_attention(tiny.flux(), "Huage001/CLEAR", weight_name=name)),
        output(load_linear_attention(tiny.flux(), tmp_path, weight_name=name)),
    )
    assert 'give weight_name="clear_local' in run(capsys, "pull", "Huage001/CLEAR", status=1)


def test_errors_are_explained_on_one_line(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = run(capsys, "info", "me/nothing", status=1)
    assert error.startswith("diffusers-linattn info: There is no folder 'me/nothing' here")
    assert len(error.splitlines()) == 1
    assert "nothing is no folder" in run(capsys, "push", tmp_path / "nothing", REPO, status=1)
    save_linear_attention(student(), tmp_path / "student")
    assert "no repository me/no" in run(capsys, "push", tmp_path / "student", "me/no", "--create-pr", status=1)
    weights = tmp_path / "student" / WEIGHTS_NAME
    assert f"give its folder, '{tmp_path / 'student'}', and weight_name='{WEIGHTS_NAME}'" in run(
        capsys, "info", weights, status=1
    )
    picture = f"a cat={tmp_path / 'none.png'}"
    assert "is no picture file" in run(capsys, "push", tmp_path / "student", "me/new", "--image", picture, status=1)
    assert "me/new" not in hub.repos
    assert "PROMPT=FILE" in run(capsys, "push", tmp_path, REPO, "--image", "cat.png", status=1)
    for name in ("a bad name!", "x" * 300, ""):
        assert "neither a folder" in run(capsys, "info", name, status=1)
    with pytest.raises(SystemExit) as caught:
        main(["fly"])
    assert caught.value.code == 2
    push()
    (weights,) = (content for name, content in hub.files(REPO).items() if name == WEIGHTS_NAME)
    hub.repos[REPO].commit({**hub.files(REPO), WEIGHTS_NAME: weights[:-100]})
    assert "altered" in run(capsys, "info", REPO, status=1)
    assert "altered" in run(capsys, "pull", REPO, status=1)


def test_as_a_module_with_the_endpoint_of_the_environment(hub: Hub, tmp_path: Path) -> None:
    push(private=True)
    command = [sys.executable, "-m", "diffusers_linattn", "info", REPO]
    env = environment(hub, tmp_path)
    result = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120)
    assert "FluxTransformer2DModel of black-forest-labs/FLUX.1-dev" in result.stdout
    assert not hub.leaks
