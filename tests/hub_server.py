"""A small Hub for tests, on 127.0.0.1, for the real client of huggingface_hub: repositories of models with commits,
branches, tags, pull requests, LFS files, private and gated access, and failures on request.

LFS files are served from a second port, as the Hub serves them from another origin: a token that arrives there is
noted in `leaks` and refused.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


OWNER = "hf_owner_token"
READER = "hf_reader_token"  # of the same account
STRANGER = "hf_stranger_token"
LICENSES = {"apache-2.0", "mit", "openrail", "openrail++", "other", "cc-by-4.0", "cc-by-nc-4.0", "unknown"}
LFS_SUFFIXES = (".safetensors", ".png", ".jpg", ".bin")


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "", parent: str = "main") -> str:
        key = json.dumps([len(self.commits), message, sorted(files)]).encode()
        sha = hashlib.sha1(key + b"".join(files[name] for name in sorted(files))).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class Failure:
    """What to do instead of answering: a status, or to close the connection after so many bytes of the body."""

    method: str
    path: str
    times: int
    status: int | None = None
    cut_after: int | None = None


class Hub:
    """The state of the Hub, and the addresses that it listens on."""

    def __init__(self) -> None:
        self.endpoint = self.cdn = ""
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Forget everything but the addresses."""
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.leaks: list[str] = []
        self.failures: list[Failure] = []
        self.answers_ranges = True
        # With a folder here, LFS files go to and come from the Xet store in it. Which file has which hash there only
        # hf_xet can tell: by sha256, its Xet hash and its content.
        self.xet_folder: str | None = None
        self.xet_files: dict[str, tuple[str, bytes]] = {}
        self.on_request: Callable[[str, str], None] = lambda method, path: None

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, **settings: Any) -> Repo:
        repo = self.repos[repo_id] = Repo(**settings)
        repo.commit({".gitattributes": b"", **(files or {})}, message="initial commit")
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision) or ""]

    def requests(self, method: str, part: str) -> list[str]:
        return [path for m, path in self.log if m == method and part in path]

    def fail(self, method: str, path: str, times: int = 1, **how: Any) -> None:
        self.failures.append(Failure(method, path, times, **how))


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers until the end of this context."""
    hub = Hub()
    servers = []
    for handler in (_Api, _Cdn):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    # Of another name: to huggingface_hub 1.33 a redirect to another port of the same host is one inside the Hub.
    names = ("127.0.0.1", "localhost")
    hub.endpoint, hub.cdn = (
        f"http://{name}:{server.server_address[1]}" for name, server in zip(names, servers, strict=True)
    )
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def check_card(text: str) -> list[str]:
    """What the Hub would refuse in the YAML of a README: its rules as far as they concern cards like ours."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"]
    errors = []
    if data.get("license", "unknown") not in LICENSES:
        errors.append('"license" must be one of a list')
    if not re.fullmatch(r"[\w.\-]+", data.get("license_name", "x")):
        errors.append('"license_name" must be a slug')
    if not re.match(r"https?://|LICENSE", data.get("license_link", "https://")):
        errors.append('"license_link" must be LICENSE, LICENSE.md or a URL')
    if data.get("base_model_relation", "adapter") not in {"adapter", "finetune", "merge", "quantized"}:
        errors.append('"base_model_relation" must be one of a list')
    bases = data.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", base):
            errors.append('"base_model" must be the id of a repository')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be an array of strings')
    for entry in data.get("widget", []):
        if not isinstance(entry.get("text"), str) or not isinstance(entry.get("output", {}).get("url"), str):
            errors.append('"widget" needs text and output.url')
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        parts = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(parts.query)
        hub, path = self.hub, parts.path
        hub.on_request(self.command, path)
        with hub.lock:
            hub.log.append((self.command, self.path))
            failure = next((f for f in hub.failures if f.method == self.command and f.path in path and f.times), None)
            if failure is not None:
                failure.times -= 1
        self.cut_after = failure.cut_after if failure else None
        if failure is not None and failure.status is not None:
            return self.send(failure.status, {"error": "failing as asked"})
        with hub.lock:
            return self.answer(path)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def answer(self, path: str) -> None:
        raise NotImplementedError

    def send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_after is not None and len(content) > self.cut_after:
            self.wfile.write(content[: self.cut_after])
            self.close_connection = True
            return
        self.wfile.write(content)

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and self.command == "GET" and self.hub.answers_ranges:
            start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            return self.send(206, content[start:stop], headers)
        return self.send(200, content, headers)


class _Cdn(_Handler):
    """Where LFS files are: another origin, which must never see a token."""

    def answer(self, path: str) -> None:
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.path)
            return self.send(400, b"a token arrived here")
        oid = path.rpartition("/")[2]
        if self.command == "PUT":
            self.hub.blobs[oid] = self.body
            return self.send(200)
        content = self.hub.blobs.get(oid)
        return self.send(404) if content is None else self.send_file(content, {"ETag": f'"{oid}"'})


class _Api(_Handler):
    def answer(self, path: str) -> None:
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, **{k: urllib.parse.unquote(v) for k, v in match.groupdict().items() if v})
        return self.send(404, {"error": f"no route {self.command} {path}"})

    def error(self, status: int, code: str, message: str, **headers: str) -> None:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message, **headers})

    def repo(self, repo_id: str, write: bool = False, content: bool = False) -> Repo | None:
        """The repository if the token may see it; otherwise the error is sent."""
        if self.token and self.token not in (OWNER, STRANGER):
            self.error(401, "", "Invalid credentials in Authorization header")
            return None
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.token != OWNER):
            self.error(404 if self.token else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and content and self.token != OWNER:
            self.error(403 if self.token else 401, "GatedRepo", "Access to this repo is restricted")
        elif write and self.token != OWNER:
            self.error(403, "", "You have no write access")
        else:
            return repo
        return None

    def at(self, repo_id: str, revision: str, **access: bool) -> tuple[Repo, str] | None:
        repo = self.repo(repo_id, **access)
        if repo is None:
            return None
        sha = repo.resolve(revision)
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, sha

    def whoami(self) -> None:
        roles = {OWNER: "write", READER: "read"}
        if self.token in roles:
            orgs = [{"name": "lab", "roleInOrg": "contributor"}, {"name": "club", "roleInOrg": "read"}]
            return self.send(200, {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": roles[self.token]}}})
        return self.error(401, "", "Invalid credentials in Authorization header")

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if self.token != OWNER:
            return self.error(401, "", "Invalid credentials in Authorization header")
        if not repo_id.startswith("me/"):
            return self.error(403, "", "You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repos:
            return self.send(409, url)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.create(repo_id, private=private)
        return self.send(200, url)

    def validate_yaml(self) -> None:
        errors = check_card(json.loads(self.body)["content"])
        self.send(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        found = self.at(repo_id, revision, write="create_pr" not in self.query)
        if found is None:
            return None
        there = found[0].commits[found[1]]
        answers = []
        for item in json.loads(self.body)["files"]:
            path, old = item["path"], there.get(item["path"])
            oid = old and (hashlib.sha256(old).hexdigest() if is_lfs(path) else git_oid(old))
            mode = "lfs" if is_lfs(path) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.send(200, {"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        objects = []
        for item in json.loads(self.body)["objects"]:
            oid = item["oid"]
            actions = {
                "upload": {"href": f"{self.hub.cdn}/{oid}"},
                "verify": {"href": f"{self.hub.endpoint}/lfs-verify"},
            }
            objects.append({**item, **({} if oid in self.hub.blobs else {"actions": actions})})
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_verify(self) -> None:
        asked = json.loads(self.body)
        known = len(self.hub.blobs.get(asked["oid"], b"")) == asked["size"]
        self.send(200 if known else 404, {})

    def commit(self, repo_id: str, revision: str) -> None:
        pull_request = "create_pr" in self.query
        found = self.at(repo_id, revision, write=not pull_request)
        if found is None:
            return None
        repo, sha = found
        files, summary = dict(repo.commits[sha]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                summary = value["summary"]
                if value.get("parentCommit") not in (None, sha):
                    return self.error(412, "", "The branch has moved")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                oid = value["oid"]
                files[value["path"]] = self.hub.xet_files[oid][1] if self.hub.xet_folder else self.hub.blobs[oid]
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                return self.error(404, "EntryNotFound", "A file with this name doesn't exist")
        numbers = [int(ref.rpartition("/")[2]) for ref in repo.refs if ref.startswith("refs/pr/")]
        number = max(numbers, default=0) + 1
        oid = repo.commit(files, f"refs/pr/{number}" if pull_request else revision, summary)
        answer = {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "success": True}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        return self.send(200, answer)

    def info(self, repo_id: str, revision: str = "main") -> None:
        found = self.at(repo_id, revision)
        if found is not None:
            self.send(200, self.describe(repo_id, *found))

    def describe(self, repo_id: str, repo: Repo, sha: str) -> dict[str, Any]:
        files = repo.commits[sha]
        match = re.match(r"---\n(.*?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL)
        card = yaml.safe_load(match[1]) if match else {}
        tags = list(card.get("tags", []))
        if card.get("base_model"):
            tags += [f"base_model:{card['base_model']}"]
            tags += [f"base_model:{card.get('base_model_relation', 'finetune')}:{card['base_model']}"]
        return {
            "id": repo_id,
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "siblings": [{"rfilename": name} for name in sorted(files)],
            "tags": tags,
            "cardData": card,
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "downloads": 0,
        }

    def models(self) -> None:
        asked = [tag for value in self.query.get("filter", []) for tag in value.split(",")]
        described = [
            self.describe(repo_id, repo, repo.refs["main"])
            for repo_id, repo in self.hub.repos.items()
            if not repo.private or self.token == OWNER
        ]
        self.send(200, [entry for entry in described if set(asked) <= set(entry["tags"])])

    def tree(self, repo_id: str, revision: str) -> None:
        found = self.at(repo_id, revision)
        if found is None:
            return None
        entries = []
        for name, content in sorted(found[0].commits[found[1]].items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
            if is_lfs(name):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return self.send(200, entries)

    def branch(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=True)
        if repo is None:
            return None
        if revision in repo.refs:
            return self.error(409, "", "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repo.refs[revision] = repo.resolve(start) or ""
        return self.send(200, {})

    def tag(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, write=True)
        if repo is not None:
            repo.refs[json.loads(self.body)["tag"]] = repo.resolve(revision) or ""
            self.send(200, {})

    def merge(self, repo_id: str, number: str) -> None:
        repo = self.repo(repo_id, write=True)
        if repo is not None:
            repo.refs["main"] = repo.refs[f"refs/pr/{number}"]
            self.send(200, {})

    def xet_token(self, repo_id: str, kind: str, revision: str) -> None:
        found = self.at(repo_id, revision, write=kind == "write", content=True)
        if found is not None:
            url, token, end = f"local://{self.hub.xet_folder}", "xet_token", 4_000_000_000
            headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(end)}
            self.send(200, {"casUrl": url, "accessToken": token, "exp": end}, headers)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self.at(repo_id, revision, content=True)
        if found is None:
            return None
        repo, sha = found
        content = repo.commits[sha].get(name)
        if content is None:
            return self.error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        if not is_lfs(name):
            return self.send_file(content, {"X-Repo-Commit": sha, "ETag": f'"{git_oid(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        self.hub.blobs[oid] = content
        headers = {
            "X-Repo-Commit": sha,
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.hub.cdn}/{oid}",
        }
        if self.hub.xet_folder:
            headers["X-Xet-Hash"] = self.hub.xet_files[oid][0]
            headers["Link"] = f'<{self.hub.endpoint}/api/models/{repo_id}/xet-read-token/{sha}>; rel="xet-auth"'
        return self.send(302, b"", headers)


_ID = r"(?P<repo_id>[\w.\-]+/[\w.\-]+)"
_REV = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", _Api.whoami),
    ("POST", r"/api/repos/create", _Api.create),
    ("POST", r"/api/validate-yaml", _Api.validate_yaml),
    ("POST", rf"/api/models/{_ID}/preupload/{_REV}", _Api.preupload),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Api.lfs_batch),
    ("POST", r"/lfs-verify", _Api.lfs_verify),
    ("POST", rf"/api/models/{_ID}/commit/{_REV}", _Api.commit),
    ("POST", rf"/api/models/{_ID}/branch/{_REV}", _Api.branch),
    ("POST", rf"/api/models/{_ID}/tag/{_REV}", _Api.tag),
    ("POST", rf"/api/models/{_ID}/discussions/(?P<number>\d+)/merge", _Api.merge),
    ("GET", rf"/api/models/{_ID}/xet-(?P<kind>read|write)-token/{_REV}", _Api.xet_token),
    ("GET", r"/api/models", _Api.models),
    ("GET", rf"/api/models/{_ID}/tree/{_REV}", _Api.tree),
    ("GET", rf"/api/models/{_ID}/revision/{_REV}", _Api.info),
    ("GET", rf"/api/models/{_ID}", _Api.info),
    ("GET HEAD", rf"/{_ID}/resolve/{_REV}/(?P<name>.+)", _Api.resolve),
]
