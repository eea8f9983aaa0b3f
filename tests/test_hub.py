"""Publishing and loading through the real client of the Hub, against a Hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hub_client import REPO, environment, output, push, student, tiny_image
from hub_server import OWNER, READER, STRANGER, Hub
from huggingface_hub import HfApi, constants

from diffusers_linattn import (
    find_linear_attention,
    load_linear_attention,
    push_linear_attention,
    restore,
    save_linear_attention,
)
from diffusers_linattn.hub import check_can_push, push_folder
from diffusers_linattn.linearize import layers_of
from diffusers_linattn.sharing.checkpoint import WEIGHTS_NAME
from diffusers_linattn.sharing.saved_config import CONFIG_NAME
from diffusers_linattn.sharing.sources import HubError

import tiny


def check_unchanged(model: Any, message: str, *arguments: Any, **options: Any) -> None:
    """Loading fails with that message, and the model is as it was."""
    before = output(model)
    processors = [layer.attn.processor for layer in layers_of(model)]
    with pytest.raises(HubError, match=message) as caught:
        load_linear_attention(model, *arguments, **options)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, OSError)
    assert OWNER not in str(caught.value)
    assert [layer.attn.processor for layer in layers_of(model)] == processors
    assert torch.equal(output(model), before)


def test_push_and_load_give_equal_bytes_and_outputs(hub: Hub, tmp_path: Path) -> None:
    pipe = student()
    commit = push(pipe, metrics={"FID": 13.5}, images={"a cat": tiny_image()})
    assert commit.commit_url.startswith(hub.endpoint)
    assert hub.repos[REPO].messages == ["initial commit", "Upload linear attention"]
    files = hub.files(REPO)
    assert set(files) == {".gitattributes", "README.md", CONFIG_NAME, WEIGHTS_NAME, "images/000.png"}
    save_linear_attention(pipe, tmp_path / "folder")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "folder" / name).read_bytes() == files[name]
    other = tiny.flux()
    stock = output(other)
    assert load_linear_attention(other, REPO) is other
    assert torch.equal(output(other), output(pipe))
    assert torch.equal(output(restore(other)), stock)
    # The cache holds the same bytes, and is itself a folder to load from: its files are links.
    snapshot = next((Path(constants.HF_HUB_CACHE) / "models--me--flux-clear" / "snapshots").iterdir())
    assert (snapshot / WEIGHTS_NAME).is_symlink()
    assert (snapshot / WEIGHTS_NAME).read_bytes() == files[WEIGHTS_NAME]
    assert torch.equal(output(load_linear_attention(tiny.flux(), snapshot)), output(pipe))
    assert not hub.leaks


def test_loading_again_asks_little_and_by_commit_nothing(hub: Hub) -> None:
    push()
    load_linear_attention(tiny.flux(), REPO)
    hub.log.clear()
    load_linear_attention(tiny.flux(), REPO)
    assert {method for method, _ in hub.log} == {"HEAD"}
    assert len(hub.log) <= 3
    hub.log.clear()
    load_linear_attention(tiny.flux(), REPO, revision=hub.repos[REPO].refs["main"])
    assert not hub.log
    load_linear_attention(tiny.flux(), REPO, force_download=True)
    assert hub.requests("GET", CONFIG_NAME)


def test_an_unchanged_push_makes_no_commit(hub: Hub) -> None:
    pipe = student()
    push(pipe)
    before = hub.repos[REPO].refs["main"]
    hub.log.clear()
    assert push(pipe).oid == before
    assert hub.repos[REPO].refs["main"] == before
    assert not hub.requests("POST", "/commit/")
    push(student(seed=1))
    assert len(hub.repos[REPO].messages) == 3


def test_a_readme_that_a_person_edited_is_kept(hub: Hub) -> None:
    pipe = student()
    push(pipe, images={"a cat": tiny_image()})
    assert b"a cat" in hub.files(REPO)["README.md"]
    push(pipe, metrics={"FID": 9.0})  # ours, untouched: written anew, with the pictures that were there
    card = hub.files(REPO)["README.md"]
    assert b"| FID | 9 |" in card
    assert b"a cat" in card
    edited = card + b"\nMy own words.\n"
    hub.repos[REPO].commit({**hub.files(REPO), "README.md": edited})
    push(pipe, metrics={"FID": 8.0})
    assert hub.files(REPO)["README.md"] == edited
    assert json.loads(hub.files(REPO)[CONFIG_NAME])["metrics"] == {"FID": 8.0}


def test_a_push_does_not_run_over_one_that_came_meanwhile(hub: Hub) -> None:
    push()

    def edit_meanwhile(method: str, path: str) -> None:
        if "/preupload/" in path:
            hub.repos[REPO].commit({**hub.files(REPO), "README.md": b"# Mine"})

    hub.on_request = edit_meanwhile
    with pytest.raises(HubError, match="has changed meanwhile: try again"):
        push(student(seed=1))
    hub.on_request = lambda method, path: None
    push(student(seed=1))
    assert hub.files(REPO)["README.md"] == b"# Mine"


def test_branch_tag_and_commit(hub: Hub) -> None:
    first, second = student(seed=1), student(seed=2)
    push(first)
    sha = hub.repos[REPO].refs["main"]
    HfApi().create_tag(REPO, tag="v1")
    push(second)
    push(first, revision="experiment")
    for revision, expected in (("v1", first), (sha, first), ("experiment", first), (None, second)):
        model = load_linear_attention(tiny.flux(), REPO, revision=revision)
        assert torch.equal(output(model), output(expected)), revision


def test_a_pull_request_and_its_merge(hub: Hub) -> None:
    first, second = student(seed=1), student(seed=2)
    push(first)
    commit = push(second, create_pr=True, commit_message="Better weights", token=STRANGER)
    assert commit.pr_url.endswith("/discussions/1")
    assert hub.repos[REPO].messages[-1] == "Better weights"
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(first))
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO, revision="refs/pr/1")), output(second))
    HfApi().merge_pull_request(REPO, 1)
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(second))
    with pytest.raises(ValueError, match="create_pr=True opens its own branch"):
        push(create_pr=True, revision="experiment")
    with pytest.raises(HubError, match="no repository me/nothing on the Hub to open a pull request in"):
        push_linear_attention(student(), "me/nothing", create_pr=True)


def test_private(hub: Hub) -> None:
    push(private=True)
    assert hub.repos[REPO].private
    check_unchanged(tiny.flux(), r"it is private.*hf auth login.*token=", REPO, token=False)
    check_unchanged(tiny.flux(), r"it is private", REPO, token=STRANGER)
    load_linear_attention(tiny.flux(), REPO, token=OWNER)
    with pytest.raises(ValueError, match="exists and is private: leave private= out"):
        push(private=False)


def test_gated(hub: Hub) -> None:
    push()
    hub.repos[REPO].gated = True
    for token in (STRANGER, False):
        check_unchanged(tiny.flux(), r"is gated: accept its conditions.*token=", REPO, token=token)
    load_linear_attention(tiny.flux(), REPO)


def test_a_token_that_is_refused(hub: Hub) -> None:
    push()
    check_unchanged(tiny.flux(), "There is no token, or it is not accepted", REPO, token="hf_wrong")
    with pytest.raises(HubError, match=r"may not do that.*write access"):
        push(student(seed=3), token=STRANGER)
    with pytest.raises(HubError, match="may not do that"):
        push_linear_attention(student(), "you/flux-clear")


def test_a_repository_without_an_owner_is_the_accounts_own(hub: Hub) -> None:
    commit = push_linear_attention(student(), "flux-clear")
    assert f"{hub.endpoint}/me/flux-clear/commit/" in commit.commit_url
    assert "me/flux-clear" in hub.files("me/flux-clear")["README.md"].decode()


def test_that_a_push_will_fail_is_known_before_the_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for repo_id in (REPO, "lab/flux-clear", "flux-clear"):
        check_can_push(repo_id)
    for repo_id, token, message in (
        ("me/flux--clear", OWNER, "is not the id of a repository on the Hub"),
        ("you/flux-clear", OWNER, "me cannot push to you/flux-clear, only to repositories of lab, me"),
        ("club/flux-clear", OWNER, "me cannot push to club/flux-clear"),
        (REPO, READER, "The token of me may only read"),
        (REPO, "hf_wrong", "There is no token, or it is not accepted: log in"),
    ):
        with pytest.raises(ValueError, match=message):
            check_can_push(repo_id, token=token)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        check_can_push(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="while HF_HUB_OFFLINE is set"):
        check_can_push(REPO)
    assert not hub.repos
    assert not hub.requests("POST", "")


def test_what_is_not_there(hub: Hub) -> None:
    push()
    check_unchanged(tiny.flux(), "There is no folder 'me/nothing' here and no such repository", "me/nothing")
    check_unchanged(tiny.flux(), "no branch, tag or commit 'v9'", REPO, revision="v9")
    check_unchanged(tiny.flux(), "has no other.safetensors. Check subfolder", REPO, weight_name="other.safetensors")
    for options, message in (
        ({"variant": "fp16"}, "linear_attention.fp16.safetensors does not exist, nor"),
        ({"subfolder": "deep"}, "linear_attention_config.json does not exist. Check subfolder"),
    ):
        with pytest.raises(ValueError, match=message):
            load_linear_attention(tiny.flux(), REPO, **options)
    for local in ("./no/such/folder", "../no", "/no/such", Path("no/such")):
        hub.log.clear()
        with pytest.raises(ValueError, match=f"There is no folder {local} here"):
            load_linear_attention(tiny.flux(), local)
        assert not hub.log
    with pytest.raises(ValueError, match="is neither a folder here nor the id of a repository"):
        load_linear_attention(tiny.flux(), "no/such/folder")


def test_offline_with_and_without_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = student()
    push(pipe)
    load_linear_attention(tiny.flux(), REPO)
    hub.log.clear()
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO, local_files_only=True)), output(pipe))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(pipe))
    check_unchanged(tiny.flux(), "not in the cache.*run once without", "me/other")
    with pytest.raises(ValueError, match="Only the cache was searched"):
        load_linear_attention(tiny.flux(), REPO, variant="fp16")
    with pytest.raises(ValueError, match="force_download=True needs the Hub"):
        load_linear_attention(tiny.flux(), REPO, force_download=True)
    assert not hub.log


def test_sharded_weights_offline(hub: Hub, tmp_path: Path) -> None:
    pipe = student()
    save_linear_attention(pipe, tmp_path / "shards", max_shard_size="1KB")
    push_folder(tmp_path / "shards", REPO)
    assert sum(name.endswith(".safetensors") for name in hub.files(REPO)) > 1
    huggingface_hub.snapshot_download(REPO, endpoint=hub.endpoint)  # without asking for the name of one file
    model = load_linear_attention(tiny.flux(), REPO, local_files_only=True)
    assert torch.equal(output(model), output(pipe))
    push(pipe)  # in one file again: the shards and their index go
    assert set(hub.files(REPO)) == {".gitattributes", "README.md", CONFIG_NAME, WEIGHTS_NAME}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits between its tries."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


@pytest.mark.usefixtures("no_waiting")
def test_the_hub_is_down(hub: Hub) -> None:
    pipe = student()
    push(pipe)
    hub.fail("HEAD", "resolve", times=10_000, status=503)
    check_unchanged(tiny.flux(), "could not be reached: check the connection and try again", REPO)
    hub.failures.clear()
    load_linear_attention(tiny.flux(), REPO)
    hub.fail("HEAD", "resolve", times=10_000, status=503)
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(pipe))  # from the cache
    hub.fail("GET", "api/models", times=10_000, status=503)
    with pytest.raises(HubError, match="answered 503 for me/flux-clear. Try again later"):
        push(student(seed=1))


@pytest.mark.usefixtures("no_waiting")
def test_a_short_outage_is_waited_for(hub: Hub) -> None:
    pipe = student()
    push(pipe)
    hub.fail("HEAD", "resolve", times=2, status=503)
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(pipe))


@pytest.mark.usefixtures("no_waiting")
def test_a_connection_that_breaks_off_is_resumed(hub: Hub) -> None:
    pipe = student()
    push(pipe)
    oid = hashlib.sha256(hub.files(REPO)[WEIGHTS_NAME]).hexdigest()
    hub.fail("GET", oid, times=3, cut_after=2_000)
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(pipe))
    assert len(hub.requests("GET", oid)) == 4


@pytest.mark.usefixtures("no_waiting")
def test_a_download_that_never_ends_leaves_nothing_half_written(hub: Hub) -> None:
    pipe = student()
    push(pipe)
    oid = hashlib.sha256(hub.files(REPO)[WEIGHTS_NAME]).hexdigest()
    hub.fail("GET", oid, times=10_000, cut_after=0)
    check_unchanged(tiny.flux(), "The connection to the Hub failed.*Try again: what is complete is kept", REPO)
    assert not list(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS_NAME))
    hub.failures.clear()
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(pipe))


def test_all_files_come_from_one_commit(hub: Hub, tmp_path: Path) -> None:
    first, second = student(seed=1), student(seed=2, window=3)
    push(first)
    save_linear_attention(second, tmp_path)
    newer = {name: (tmp_path / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)}

    def push_meanwhile(method: str, path: str) -> None:
        if method == "GET" and path.endswith(CONFIG_NAME) and len(hub.repos[REPO].commits) == 2:
            hub.repos[REPO].commit({**hub.files(REPO), **newer})

    hub.on_request = push_meanwhile
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(first))
    assert len(hub.repos[REPO].commits) == 3
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(second))


@pytest.mark.usefixtures("no_waiting")
def test_an_update_that_fails_leaves_the_older_commit_for_use_offline(hub: Hub) -> None:
    first, second = student(seed=1), student(seed=2)
    push(first)
    load_linear_attention(tiny.flux(), REPO)
    push(second)
    hub.fail("GET", hashlib.sha256(hub.files(REPO)[WEIGHTS_NAME]).hexdigest(), times=10_000, cut_after=0)
    check_unchanged(tiny.flux(), "The connection to the Hub failed", REPO)
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO, local_files_only=True)), output(first))


def test_weights_that_cannot_belong_to_the_model_are_not_downloaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push()
    monkeypatch.setattr("diffusers_linattn.weights.MAX_OVERHEAD", 0)
    monkeypatch.setattr("diffusers_linattn.weights.BYTES_PER_PARAMETER", 0.01)
    hub.log.clear()
    with pytest.raises(ValueError, match=r"linear_attention.safetensors has \d+ bytes where at most \d+ can belong"):
        load_linear_attention(tiny.flux(), REPO)
    assert not [path for method, path in hub.log if method == "GET" and not path.endswith(CONFIG_NAME)]


def test_weights_are_downloaded_after_all_that_can_be_checked_without(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_linear_attention(student(), tmp_path / "shards", max_shard_size="1KB")
    push_folder(tmp_path / "shards", REPO)
    files = hub.files(REPO)
    shards = {hashlib.sha256(content).hexdigest() for name, content in files.items() if name.endswith(".safetensors")}

    def downloaded() -> int:
        return len({path for method, path in hub.log if method == "GET" and path.rpartition("/")[2] in shards})

    with pytest.raises(ValueError, match="is for a FluxTransformer2DModel, this model is a DiTTransformer2DModel"):
        load_linear_attention(tiny.dit(), REPO)
    assert downloaded() == 0
    index = f"{WEIGHTS_NAME}.index.json"
    renamed = json.loads(files[index])
    renamed["weight_map"] = {f"{name}s": file for name, file in renamed["weight_map"].items()}
    hub.repos[REPO].commit({**files, index: json.dumps(renamed).encode()})
    with pytest.raises(ValueError, match="misses .* has extra"):
        load_linear_attention(tiny.flux(), REPO)
    assert downloaded() == 0
    # Each file fits into what the model could need, all of them together do not.
    hub.repos[REPO].commit(files)
    total = sum(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    monkeypatch.setattr("diffusers_linattn.sharing.checkpoint.MAX_OVERHEAD", total - 1)
    monkeypatch.setattr("diffusers_linattn.sharing.checkpoint.MAX_BYTES_PER_NUMBER", 0)
    with pytest.raises(ValueError, match=r"has \d+ bytes where at most \d+ can belong"):
        load_linear_attention(tiny.flux(), REPO)
    assert 0 < downloaded() < len(shards)


def test_the_token_reaches_no_other_origin_and_no_log(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("huggingface_hub", "diffusers_linattn", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, name)
    push(token=OWNER)
    load_linear_attention(tiny.flux(), REPO, token=OWNER)
    assert any(path.startswith("/") and len(path) == 65 for _, path in hub.log)  # the other origin was asked
    assert not hub.leaks
    assert OWNER not in caplog.text


def test_find(hub: Hub) -> None:
    pipe = student()
    push(pipe)
    push_linear_attention(pipe, "me/hidden", private=True)
    hub.create("you/lora", {"README.md": b"---\nbase_model: black-forest-labs/FLUX.1-dev\n---\n"})
    other = student()
    other.register_to_config(_name_or_path="black-forest-labs/FLUX.1-schnell")
    push_linear_attention(other, "me/schnell")
    assert set(find_linear_attention(pipe)) == {REPO, "me/hidden"}
    assert set(find_linear_attention(pipe, token=False)) == {REPO}
    assert set(find_linear_attention(other)) == {"me/schnell"}
    with pytest.raises(ValueError, match="The base model is not known: load the pipeline by its id"):
        find_linear_attention(tiny.flux_pipeline())


def test_the_base_model_tells_the_license(hub: Hub) -> None:
    card = b"---\nlicense: apache-2.0\npipeline_tag: image-to-image\n---\n"
    hub.create("black-forest-labs/FLUX.1-dev", {"README.md": card})
    push()
    written = huggingface_hub.ModelCard(hub.files(REPO)["README.md"].decode())
    assert written.data.license == "apache-2.0"
    assert written.data.pipeline_tag == "image-to-image"


def test_xet(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client does by default for large files, against the store that hf_xet keeps in a folder for tests."""
    hf_xet = pytest.importorskip("hf_xet")
    if not hasattr(hf_xet, "hash_files"):
        pytest.skip("this hf_xet does not tell the hashes of files")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet cache"))
    hub.xet_folder = str(tmp_path / "xet")
    pipe = student()
    save_linear_attention(pipe, tmp_path / "student")
    weights = tmp_path / "student" / WEIGHTS_NAME
    content, (hashed,) = weights.read_bytes(), hf_xet.hash_files([str(weights)])
    hub.xet_files[hashlib.sha256(content).hexdigest()] = (hashed.hash, content)
    push_folder(tmp_path / "student", REPO)
    assert hub.repos[REPO].messages == ["initial commit", "Upload linear attention"]
    assert torch.equal(output(load_linear_attention(tiny.flux(), REPO)), output(pipe))
    assert hub.requests("GET", "xet-write-token")
    assert hub.requests("GET", "xet-read-token")
    snapshot = next(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*"))
    assert torch.equal(output(load_linear_attention(tiny.flux(), snapshot)), output(pipe))
    assert not hub.blobs or not hub.requests("GET", "/" + next(iter(hub.blobs)))
    before = hub.repos[REPO].refs["main"]
    assert push_folder(tmp_path / "student", REPO).oid == before


def test_two_processes_load_at_once(hub: Hub, tmp_path: Path) -> None:
    pipe = student()
    push(pipe)
    code = f"""
import sys, tiny, torch
from diffusers_linattn import load_linear_attention
model = load_linear_attention(tiny.flux(), {REPO!r})
with torch.no_grad():
    torch.save(model(**tiny.flux_inputs())[0], sys.argv[1])
"""
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / f"{i}.pt")], env=environment(hub, tmp_path))
        for i in range(2)
    ]
    assert [child.wait(120) for child in children] == [0, 0]
    for i in range(2):
        assert torch.equal(torch.load(tmp_path / f"{i}.pt"), output(pipe))
    assert not hub.leaks
