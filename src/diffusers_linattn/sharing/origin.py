"""Which published model a pipeline or transformer came from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diffusers_linattn.linearize import transformers_of


_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")


def base_model_of(pipe_or_model: Any) -> tuple[str | None, str | None]:
    """Hub id and commit of the original model, as far as its pipeline and its own configuration tell."""
    names = [getattr(pipe_or_model, "name_or_path", None)]
    names += [model.config.get("_name_or_path") for model in transformers_of(pipe_or_model)]  # type: ignore[union-attr,operator]
    repo_id = commit = None
    for name in (str(name) for name in names if name):
        if cached := _CACHED.search(name):
            repo_id, commit = repo_id or cached[1].replace("--", "/"), commit or cached[2]
        elif not Path(name).exists() and is_repo_id(name):  # a folder of this machine means nothing to others
            repo_id = repo_id or name
    return repo_id, commit


def is_repo_id(name: str) -> bool:
    """Whether a repository of the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
