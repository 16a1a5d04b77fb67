"""A stand-in for the Hugging Face Hub on this machine: repositories of files over HTTP, both ways.

It knows what huggingface_hub asks for: files at a branch or a commit, a repository's state and list of
files, and for uploads a new repository, a new branch and a commit. Faults can be put in the way.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|branch|preupload|commit)/([^/]+))?(/.+)?")


class Request(NamedTuple):
    """What was asked for; `repo`, `revision` and `path` are empty where the address names none."""

    method: str
    address: str
    repo: str = ""
    revision: str = ""
    path: str = ""
    headers: Mapping[str, str] = {}  # by lower-case name


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer.

    Attributes:
        status: an error of the server in place of the answer.
        sent: bytes of the body that are sent before the connection closes.
        honest: whether the header promises those alone, not the whole body.
    """

    status: int = 0
    sent: int | None = None
    honest: bool = False


def no_fault(_: Request) -> Fault | None:
    """All is well."""
    return None


@dataclass
class Repository:
    """Commits by branch, and the token that a private repository asks for."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    token: str | None = None


class RefusedError(Exception):
    """An answer that is no success, with the Hub's word for it."""

    def __init__(self, status: int, code: str = "", *, commit: str = "", url: str = "") -> None:
        super().__init__(status, code)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": commit}
        self.content = json.dumps({"error": code, "url": url}).encode()


class FakeHub:
    """The server and its repositories; a context in which it runs.

    Args:
        root: a folder for the files, `owner/name/commit/path`.

    Attributes:
        requests: what was asked for so far.
        fault: called before every answer, may return what goes wrong with it.
        bodies: JSON that was sent, by address.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.bodies: dict[str, Any] = {}
        self.fault: Callable[[Request], Fault | None] = no_fault
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on nobody answers."""
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, repo: str, files: Mapping[str, bytes], *, branch: str = "main", commit: str | None = None
    ) -> str:
        """Adds a commit of exactly these files, to which the branch then points; returns its id."""
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository())
            count = f"{repo} {len(repository.commits)}"
            commit = commit or hashlib.sha1(count.encode()).hexdigest()
            repository.branches[branch] = commit
            repository.commits.append(commit)
            for path, content in files.items():
                self.replace(repo, commit, path, content)
        return commit

    def replace(self, repo: str, commit: str, path: str, content: bytes) -> None:
        """Puts a file into a commit that is there, as no honest server would."""
        file = self.root / repo / commit / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch or a commit."""
        folder = self.root / repo / self.resolve(repo, revision)
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def resolve(self, repo: str, revision: str) -> str:
        """The commit that a branch or a commit means."""
        repository = self.repositories.get(repo)
        if repository is None:
            raise RefusedError(404, "RepoNotFound")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise RefusedError(404, "RevisionNotFound")
        return commit

    def downloads(self, repo: str) -> list[str]:
        """The files of a repository whose content was asked for, one entry a request."""
        return [each.path for each in self.requests if each.method == "GET" and each.repo == repo]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        request = self._parse()
        with self.hub.lock:
            self.hub.requests.append(request)
        fault = self.hub.fault(request) or Fault()
        try:
            if fault.status:
                raise RefusedError(fault.status)
            with self.hub.lock:
                status, headers, content = self._respond(request, body)
        except RefusedError as refused:
            status, headers, content = refused.status, refused.headers, refused.content
        sent = content[: fault.sent]
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(sent if fault.honest else content)))
        self.send_header("Connection", "close")  # so that a server that has stopped is gone
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        self.close_connection = True

    def _parse(self) -> Request:
        address = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        quoted = urlsplit(self.path).path
        if file := _FILE.fullmatch(quoted):
            return Request(self.command, address, *map(unquote, file.groups()), headers)
        if api := _API.fullmatch(quoted):
            return Request(self.command, address, api[1], unquote(api[3] or ""), "", headers)
        return Request(self.command, address, headers=headers)

    def _respond(self, request: Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of an answer."""
        if request.address == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if request.address == "/api/repos/create":
            return _json(self._create(json.loads(body)))
        branching = "/branch/" in request.address
        commit = self.hub.resolve(request.repo, "main" if branching else request.revision or "main")
        token = self.hub.repositories[request.repo].token
        if token and request.headers.get("authorization") != f"Bearer {token}":
            raise RefusedError(401, "RepoNotFound")
        if request.path:
            return self._file(request, commit)
        if branching:
            return _json(self._branch(request, commit))
        return self._state(request, commit) if request.method == "GET" else self._change(request, body)

    def _file(self, request: Request, commit: str) -> tuple[int, dict[str, str], bytes]:
        """A file, or the part of it that a range asks for."""
        file = self.hub.root / request.repo / commit / request.path
        if not file.is_file():
            raise RefusedError(404, "EntryNotFound", commit=commit)
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, headers, content[start : end + 1]
        return 200, headers, content

    def _state(self, request: Request, commit: str) -> tuple[int, dict[str, str], bytes]:
        """A repository's state, or the list of its files."""
        files = self.hub.files(request.repo, commit)
        _, _, below = request.address.partition(f"/tree/{request.revision}/")
        if below and not any(path.startswith(f"{below}/") for path in files):
            raise RefusedError(404, "EntryNotFound", commit=commit)
        if "/tree/" in request.address:
            return _json(
                [
                    {
                        "type": "file",
                        "path": path,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for path, content in files.items()
                ]
            )
        repository = self.hub.repositories[request.repo]
        return _json(
            {
                "_id": request.repo,
                "id": request.repo,
                "modelId": request.repo,
                "sha": commit,
                "private": repository.token is not None,
                "siblings": [{"rfilename": path} for path in files],
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        )

    def _create(self, wanted: Mapping[str, Any]) -> dict[str, str]:
        """A new repository, as the Hub makes it: with one commit."""
        repo = f"{wanted['organization']}/{wanted['name']}"
        self.hub.bodies["/api/repos/create"] = dict(wanted)
        if repo in self.hub.repositories:
            raise RefusedError(409, url=f"{self.hub.url}/{repo}")
        self.hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.repositories[repo].token = self.headers["Authorization"].removeprefix("Bearer ")
        return {"url": f"{self.hub.url}/{repo}"}

    def _change(self, request: Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """What an upload asks for: how to send files, then to commit them."""
        action = request.address.removeprefix(f"/api/models/{request.repo}/").split("/")[0]
        return _json({"preupload": self._preupload, "commit": self._commit}[action](request, body))

    def _branch(self, request: Request, commit: str) -> dict[str, str]:
        """A new branch that begins at a commit."""
        branches = self.hub.repositories[request.repo].branches
        if request.revision in branches:
            raise RefusedError(409)
        branches[request.revision] = commit
        return {}

    def _preupload(self, _: Request, body: bytes) -> dict[str, Any]:
        """Every file is to come within the commit."""
        files = json.loads(body)["files"]
        return {
            "files": [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files
            ]
        }

    def _commit(self, request: Request, body: bytes) -> dict[str, Any]:
        """A commit of what the branch held and what came, a line of JSON each."""
        files = self.hub.files(request.repo, request.revision)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.hub.bodies[request.address] = value
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise RefusedError(400)
        commit = self.hub.add(request.repo, files, branch=request.revision)
        return {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{self.hub.url}/{request.repo}/commit/{commit}",
        }


def _json(value: object, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()
