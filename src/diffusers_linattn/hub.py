"""Publish linear attention on the Hub, find what others published, and look at it without downloading the weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from diffusers_linattn.files import write_atomically
from diffusers_linattn.sharing.checkpoint import Checkpoint, open_checkpoint, variant_of
from diffusers_linattn.sharing.model_card import OUR_TAG, gallery_of, is_untouched, write_card
from diffusers_linattn.sharing.origin import base_model_of
from diffusers_linattn.sharing.sources import NO_LIMIT, Folder, HubError, hub_api, hub_errors, open_source
from diffusers_linattn.weights import save_linear_attention


MAX_CARD_BYTES = 4 << 20
PICTURES = (".jpeg", ".jpg", ".png", ".webp")


def push_linear_attention(
    pipe_or_model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    metrics: Mapping[str, float] | None = None,
    images: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """Save what was converted to a repository of the Hub, in one commit, with a model card.

    The repository is made if it does not exist. A README.md that a person wrote or edited is kept; otherwise the card
    is written anew. Files that are the same already are not sent, and if all are, there is no commit.

    Args:
        pipe_or_model: A converted pipeline or transformer.
        repo_id: Where to, such as `"me/flux-clear-w16"`; without an owner, among the account's own.
        private: Whether a new repository is private; `None` is the default of the account.
        token: `None` is the one of `hf auth login`.
        revision: A branch, made if it does not exist; `None` is main.
        create_pr: Open a pull request instead of committing.
        commit_message: `None` is "Upload linear attention".
        metrics: Named results for the table in the card, beside those that [`distill`] left.
        images: Sample pictures for the card, by prompt: PIL images or paths.

    Returns:
        The commit, with `commit_url` and, for a pull request, `pr_url`.

    Raises:
        ValueError: No layer is converted, a repository that is not of the visibility asked for, or ([`HubError`],
            which is an OSError as well) one that cannot be reached or written.

    Example:
        >>> push_linear_attention(pipe, "me/flux-clear-w16", private=True)  # doctest: +SKIP
    """
    _check_target(repo_id, revision, create_pr)
    with tempfile.TemporaryDirectory() as folder:
        save_linear_attention(pipe_or_model, folder, metrics=metrics)
        return push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            images=images,
        )


def push_folder(
    directory: str | Path,
    repo_id: str,
    *,
    variant: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    images: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """[`push_linear_attention`] for a folder that [`save_linear_attention`] or [`distill`] wrote.

    Only the files of the format are sent, and the folder's README.md if it has one.

    Raises:
        ValueError: As [`push_linear_attention`], or a folder whose files do not belong together.
    """
    _check_target(repo_id, revision, create_pr)
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no folder: give one that save_linear_attention or distill wrote.")
    checkpoint = open_checkpoint(Folder(directory), variant=variant, max_bytes=NO_LIMIT)
    checkpoint.check_copies()
    api = hub_api(token)
    with tempfile.TemporaryDirectory() as temporary, hub_errors(repo_id, revision):
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        pictures = _pictures(images or {}, Path(temporary))
        commit = _ensure_repository(api, repo_id, private, revision, create_pr)
        there = api.list_repo_files(repo_id, revision=commit) if commit else []
        uploads = {path.name: path for path in checkpoint.files}
        stale = [name for name in there if variant_of(name) == (variant,) and name not in uploads]
        uploads |= pictures
        old_card = _card(api, repo_id, commit, temporary) if "README.md" in there else None
        if old_card is None or is_untouched(old_card):
            uploads["README.md"] = directory / "README.md"
            if not uploads["README.md"].exists():
                uploads["README.md"] = Path(temporary, "card.md")
                gallery = [
                    {"text": prompt, "output": {"url": url}}
                    for prompt, url in zip(images or {}, pictures, strict=True)
                ]
                card = write_card(
                    checkpoint.config,
                    repo_id,
                    widget=gallery or (gallery_of(old_card) if old_card else []),
                    **_of_base_model(api, checkpoint.config.base_model),
                )
                uploads["README.md"].write_text(card, encoding="utf-8")
        # Not upload_folder, which may cut an upload into several commits.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, path) for name, path in sorted(uploads.items())),
            ],
            commit_message=commit_message or "Upload linear attention",
            revision=revision,
            create_pr=create_pr,
            parent_commit=commit,  # what was kept and what was replaced was decided on this one
        )


def check_can_push(repo_id: str, *, token: str | bool | None = None) -> None:
    """Raise unless this account can publish there: asked before the work whose result goes there. Nothing is made.

    Args:
        repo_id: The repository, which need not exist; without an owner, of the account.
        token: `None` is the one of `hf auth login`.

    Raises:
        ValueError: No id of a repository; or ([`HubError`]) no login, a token that may only read, an
            owner that the account cannot write for, or a Hub that cannot be reached.
    """
    _check_target(repo_id, None, False)
    if constants.is_offline_mode():
        raise HubError(f"{repo_id} cannot be pushed to while HF_HUB_OFFLINE is set: unset it, or push afterwards.")
    with hub_errors(repo_id):
        account = hub_api(token).whoami()
    name, login = account["name"], account.get("auth", {}).get("accessToken", {})
    owners = {name, *(org["name"] for org in account.get("orgs", ()) if org.get("roleInOrg") != "read")}
    if login.get("role") == "read":
        raise HubError(f"The token of {name} may only read: give one with write access to push to {repo_id}.")
    if "/" in repo_id and repo_id.partition("/")[0] not in owners:
        raise HubError(f"{name} cannot push to {repo_id}, only to repositories of {', '.join(sorted(owners))}.")


def find_linear_attention(pipe_or_model: Any, *, token: str | bool | None = None) -> dict[str, ModelInfo]:
    """The linear attention that was published for the base model of a pipeline.

    Args:
        pipe_or_model: A pipeline or transformer that was loaded by its id on the Hub.
        token: To find private repositories as well.

    Returns:
        What the Hub says of each repository, by its id; the most downloaded first. [`load_linear_attention`] takes
        these ids.

    Raises:
        ValueError: The base model is not known, or the Hub cannot be reached.

    Example:
        >>> list(find_linear_attention(pipe))  # doctest: +SKIP
        ['me/flux-clear-w16']
    """
    base_model, _ = base_model_of(pipe_or_model)
    if base_model is None:
        raise ValueError(
            "The base model is not known: load the pipeline by its id on the Hub, such as "
            'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev"), not from a folder.'
        )
    api = hub_api(token)
    with hub_errors(base_model):
        models = api.list_models(filter=[OUR_TAG, f"base_model:adapter:{base_model}"], sort="downloads")
        return {model.id: model for model in models}


def download(
    repo_or_directory: str | Path,
    directory: str | Path | None = None,
    *,
    variant: str | None = None,
    weight_name: str | None = None,
    **where: Any,
) -> tuple[Checkpoint, Path]:
    """Download linear attention and check its files, without a model.

    Args:
        repo_or_directory: Where from.
        directory: A folder to copy the files to; `None` leaves them in the cache.
        variant: As in [`load_linear_attention`].
        weight_name: As there.
        where: revision, subfolder, token and the other arguments of [`open_source`].

    Returns:
        What was found, and the folder that it is in.
    """
    source = open_source(repo_or_directory, **where)
    checkpoint = open_checkpoint(source, variant=variant, weight_name=weight_name, max_bytes=NO_LIMIT)
    checkpoint.check_copies()
    if directory is None:
        return checkpoint, checkpoint.files[-1].parent
    # The configuration last: without one, nobody takes the folder for complete.
    for path in reversed(checkpoint.files):
        write_atomically(Path(directory, path.name), lambda target, path=path: shutil.copyfile(path, target))  # type: ignore[misc]
    return checkpoint, Path(directory)


def _check_target(repo_id: str, revision: str | None, create_pr: bool) -> None:
    # Before anything is saved, which takes a while.
    with hub_errors(repo_id):
        validate_repo_id(repo_id)
    if create_pr and revision is not None:
        raise ValueError(f"create_pr=True opens its own branch from main: leave revision={revision!r} out.")


def _ensure_repository(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool
) -> str | None:
    """Make the repository or its branch if they do not exist; the commit that it is at."""
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if create_pr:
            raise HubError(
                f"There is no repository {repo_id} on the Hub to open a pull request in, or it is private: leave "
                "create_pr (--create-pr) out to make it, or check the spelling and the token."
            ) from error
        api.create_repo(repo_id, private=private, exist_ok=True)
    else:
        if private is not None and bool(info.private) != private:
            raise ValueError(
                f"{repo_id} exists and is {'private' if info.private else 'public'}: leave private= out, or change "
                "it in the settings of the repository first."
            )
    if revision is not None:
        try:
            return api.model_info(repo_id, revision=revision).sha
        except RevisionNotFoundError:
            api.create_branch(repo_id, branch=revision)
    return api.model_info(repo_id, revision=revision).sha


def _card(api: HfApi, repo_id: str, commit: str | None, cache_dir: str) -> str:
    path = Path(api.hf_hub_download(repo_id, "README.md", revision=commit, cache_dir=cache_dir))
    if path.stat().st_size > MAX_CARD_BYTES:
        return ""  # no card of ours
    return path.read_bytes().decode("utf-8", errors="replace")


def _pictures(images: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Files of the sample pictures, by their paths in the repository."""
    files = {}
    for number, (prompt, image) in enumerate(images.items()):
        if isinstance(image, str | Path):
            path = Path(image)
            if path.suffix.lower() not in PICTURES or not path.is_file():
                raise ValueError(f"images: {path} is no picture file ({', '.join(PICTURES)}).")
        elif hasattr(image, "save"):
            path = folder / f"{number:03d}.png"
            image.save(path)
        else:
            raise ValueError(f"images: expected PIL images or paths, got {type(image).__name__} for {prompt!r}.")
        files[f"images/{number:03d}{path.suffix.lower()}"] = path
    return files


def _of_base_model(api: HfApi, base_model: str | None) -> dict[str, Any]:
    """What the card takes over from the base model, as far as the Hub tells."""
    if base_model is None:
        return {}
    try:
        with hub_errors(base_model):
            info = api.model_info(base_model, timeout=10)
    except ValueError:  # gone, or not to be reached: the card says what is known without it
        return {}
    card = info.card_data
    license = {key: card.get(key) for key in ("license", "license_name", "license_link")} if card else {}
    found: dict[str, Any] = {"license": license}
    return found | ({"pipeline_tag": info.pipeline_tag} if info.pipeline_tag else {})
