"""Where files come from: a folder, or a repository of the Hub at one commit. Names are checked, sizes bounded."""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from diffusers_linattn.sharing.safetensors_header import Header, header_length, parse_header, read_header
from diffusers_linattn.version import __version__


# The base of all errors of the client's HTTP library, which is requests, httpx or httpx2 by the client's version.
_ConnectionError: type[Exception] = HfHubHTTPError.__bases__[0]


NO_LIMIT = 1 << 62
# The header of nearly every file is within this.
FIRST_REQUEST = 128 << 10


class HubError(OSError, ValueError):
    """Something on the Hub, or on the way there, is not as asked for.

    Both a ValueError, as all errors of this library, and an OSError, as diffusers raises for its own downloads.
    """


def hub_api(token: str | bool | None = None) -> HfApi:
    """The Hub's client, for the endpoint that the environment names."""
    return HfApi(token=token, library_name="diffusers-linattn", library_version=__version__)


class Source(ABC):
    """Files by name, from one place and one state of it."""

    where: str

    @abstractmethod
    def find(self, name: str, max_bytes: int) -> Path | None:
        """The file `name`, `None` if there is none.

        Raises:
            ValueError: It is larger than `max_bytes`, or cannot be had.
        """

    def get(self, name: str, max_bytes: int) -> Path:
        """The file `name`, or a ValueError if there is none."""
        path = self.find(name, max_bytes)
        if path is None:
            raise HubError(f"{self.where} has no {name}. {self.advice}")
        return path

    def remember(self) -> None:
        """Called when all files have been found."""
        return  # a folder has nothing to remember

    def header(self, name: str) -> tuple[Header, int] | None:
        """The header of the safetensors file `name` and the size of the file, `None` if there is none."""
        path = self.find(name, NO_LIMIT)
        return None if path is None else (read_header(path), path.stat().st_size)

    @property
    def advice(self) -> str:
        """What to do when a file is not there."""
        return "Check subfolder, variant, weight_name and revision."

    def _check_size(self, name: str, size: int, max_bytes: int) -> None:
        if size > max_bytes:
            raise ValueError(
                f"{self.where}: {name} has {size} bytes where at most {max_bytes} can belong to this model. It is not "
                "read."
            )


class Folder(Source):
    """A folder of this machine; the cache of the Hub's client is one too."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.where = str(folder)

    def find(self, name: str, max_bytes: int) -> Path | None:
        path = self.folder / name
        if not path.exists() and not path.is_symlink():
            return None
        real = _real(path)
        if not any(real.is_relative_to(root) for root in self._roots()):
            raise ValueError(f"{path} is a link out of its folder, which is not followed: copy the file there.")
        if not real.is_file():
            raise ValueError(f"{path} is not a regular file.")
        self._check_size(name, real.stat().st_size, max_bytes)
        return path

    def _roots(self) -> Iterator[Path]:
        folder = _real(self.folder)
        yield folder
        # In the cache of the Hub's client, files of models--me--name/snapshots/<commit> are links to blobs/ of that
        # repository, which may be links to blobs/ of the cache.
        for parent in folder.parents:
            if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
                yield parent.parent / "blobs"
                yield parent.parent.parent / "blobs"


class Repository(Source):
    """A repository of the Hub. The first file found fixes the commit that all others come from."""

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ):
        self.repo_id = repo_id
        self.revision = revision or constants.DEFAULT_REVISION
        self.commit: str | None = None
        self.found: str | None = None
        self.api = hub_api(token)
        self.offline = local_files_only or constants.is_offline_mode()
        self.subfolder = subfolder
        self.cache_dir = cache_dir
        self.force_download = force_download and not self.offline
        self.where = f"{repo_id}@{self.revision}" if revision else repo_id
        if force_download and self.offline:
            raise ValueError("force_download=True needs the Hub: leave out local_files_only and HF_HUB_OFFLINE.")

    def find(self, name: str, max_bytes: int) -> Path | None:
        size = self.size(name)
        if size is None:
            return None
        self._check_size(name, size, max_bytes)
        path = self._download(name, force_download=self.force_download)
        if path is None:
            return None
        self.found = self.found or name
        return Path(path)

    def remember(self) -> None:
        # At the end, so that the branch stays at a commit whose files are all there. The client notes for use offline
        # which commit a branch was at when it is asked for a file by the name of the branch.
        if self.found is None or self.offline or self.commit == self.revision:
            return
        with suppress(OSError, ValueError), hub_errors(self.repo_id):
            self.api.hf_hub_download(
                self.repo_id, self.path_of(self.found), revision=self.revision, cache_dir=self.cache_dir
            )

    def size(self, name: str) -> int | None:
        """How large the file `name` is, without downloading it; `None` if there is none."""
        ahead = self._download(name, dry_run=True)
        if ahead is None:
            return None
        self.commit = self.commit or ahead.commit_hash
        if ahead.file_size is None:
            raise HubError(f"The Hub does not tell the size of {name} in {self.where}, so it is not downloaded.")
        return int(ahead.file_size)

    def header(self, name: str) -> tuple[Header, int] | None:
        if self.offline:
            return super().header(name)
        size = self.size(name)
        if size is None:
            return None
        start = self._read(name, 0, min(FIRST_REQUEST, size))
        length = header_length(start, size, f"{self.where}: {name}")
        if len(start) < 8 + length:
            start += self._read(name, len(start), 8 + length)
        return parse_header(start[8 : 8 + length], size - 8 - length, f"{self.where}: {name}"), size

    def _read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes of a file by a range request."""
        revision = self.commit or self.revision
        url = hf_hub_url(self.repo_id, self.path_of(name), revision=revision, endpoint=self.api.endpoint)
        headers = build_hf_headers(
            token=self.api.token, library_name=self.api.library_name, library_version=self.api.library_version
        )
        headers["Range"] = f"bytes={start}-{stop - 1}"
        with (
            hub_errors(self.repo_id, revision),
            get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response,
        ):
            hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start  # a server may send the whole file
            content = b""
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) >= skip + stop - start:
                    break
        if len(content) < skip + stop - start:
            raise HubError(f"{self.where}: the Hub sent less of {name} than was asked for. Try again.")
        return content[skip : skip + stop - start]

    def path_of(self, name: str) -> str:
        """The path of the file `name` in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def _download(self, name: str, **arguments: Any) -> Any:
        revision = self.commit or self.revision
        with hub_errors(self.repo_id, revision):
            try:
                return self.api.hf_hub_download(
                    self.repo_id,
                    self.path_of(name),
                    revision=revision,
                    cache_dir=self.cache_dir,
                    local_files_only=self.offline,
                    **arguments,
                )
            except RemoteEntryNotFoundError as error:
                self.commit = self.commit or error.response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT)
                return None
            except LocalEntryNotFoundError:
                # Offline, what is not in the cache is as good as absent. With the Hub down, it may well exist.
                if self.offline and self._cached_at_all():
                    return None
                raise

    @property
    def advice(self) -> str:
        if self.offline:
            return "Only the cache was searched: run once without local_files_only and HF_HUB_OFFLINE."
        return super().advice

    def _cached_at_all(self) -> bool:
        folder = repo_folder_name(repo_id=self.repo_id, repo_type=constants.REPO_TYPE_MODEL)
        return Path(self.cache_dir or constants.HF_HUB_CACHE, folder, "snapshots").is_dir()


def open_source(
    repo_or_directory: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Source:
    """The folder of that name if there is one, else the repository of the Hub.

    Raises:
        ValueError: Neither a folder nor a possible repository id, a file, a revision of a folder, or a subfolder that
            leads out of it.
    """
    if subfolder is not None:
        parts = PurePosixPath(subfolder).parts
        if not parts or subfolder.startswith("/") or ".." in parts or "\\" in subfolder or ":" in subfolder:
            raise ValueError(f"subfolder must be a relative path inside the repository or folder, got {subfolder!r}.")
    if os.path.isdir(repo_or_directory):
        directory = Path(repo_or_directory)
        if revision is not None:
            raise ValueError(f"{directory} is a folder: revision={revision!r} only means something on the Hub.")
        folder = directory / subfolder if subfolder else directory
        if not _real(folder).is_relative_to(_real(directory)):
            raise ValueError(f"{folder} is a link out of {directory}, which is not followed.")
        return Folder(folder)
    repo_id = str(repo_or_directory)
    if os.path.isfile(repo_or_directory):
        file = Path(repo_or_directory)
        raise ValueError(
            f"{file} is a file: give its folder, {str(file.parent)!r}, and weight_name={file.name!r} to load it alone."
        )
    if isinstance(repo_or_directory, os.PathLike) or repo_id.startswith(("./", "../", "/")):
        raise ValueError(f"There is no folder {repo_id} here: check the path.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{repo_id!r} is neither a folder here nor the id of a repository on the Hub such as 'me/flux-clear-w16'."
        ) from None
    return Repository(
        repo_id,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on links that go round in circles


def check_weight_name(name: str) -> str:
    """`name` if it is that of a safetensors file without a path, else a ValueError."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.\-+ ]{0,250}\.safetensors", name):
        raise ValueError(
            f"The weights must be a .safetensors file named without a path, got {str(name)[:300]!r}. Other formats "
            "can run code when they are opened; use subfolder= for a folder inside the repository."
        )
    return name


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns the client's errors into a [`HubError`] that says what to do."""
    login = "log in with `hf auth login` or pass token="
    try:
        yield
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} is gated: accept its conditions on https://huggingface.co/{repo_id}, then {login}."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"There is no folder {repo_id!r} here and no such repository on the Hub, or it is private. Check the "
            f"spelling; if it is private, {login}."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no branch, tag or commit {revision!r}. Check revision=.") from error
    except RemoteEntryNotFoundError as error:
        raise HubError(f"{repo_id} has no such file: {error.response.url}.") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if constants.is_offline_mode() or "local_files_only" in str(error) or isinstance(error, OfflineModeIsEnabled):
            advice = "It was asked not to use the network (local_files_only or HF_HUB_OFFLINE): run once without."
        else:
            advice = "The Hub could not be reached: check the connection and try again; what is complete is kept."
        raise HubError(f"{repo_id} is not in the cache at revision {revision!r}. {advice}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        advice = {
            401: f"There is no token, or it is not accepted: {login}.",
            403: f"This account or token may not do that: {login} with write access.",
            409: "Somebody else is changing the repository: try again.",
            412: "The repository has changed meanwhile: try again.",
            429: "Too many requests: wait a little and try again.",
        }.get(status, "Try again later." if status >= 500 else error.server_message or "")
        raise HubError(f"The Hub answered {status} for {repo_id}. {advice}") from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the id of a repository on the Hub: {error}") from error
    except (_ConnectionError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"The connection to the Hub failed ({type(error).__name__}) at {repo_id}. Try again: what is complete is "
            "kept."
        ) from error
    except OSError as error:
        if isinstance(error, HubError):
            raise
        raise HubError(f"{repo_id}: {error}") from error
