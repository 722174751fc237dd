"""A small stand-in for the Hugging Face hub: as much of its protocol as loading a model by its id needs.

Read in huggingface_hub 2.4 (`file_download.get_hf_file_metadata`, `_http.hf_raise_for_status`) and
transformers 5.23 (`utils.hub.cached_files`): HEAD and GET of `/{id}/resolve/{revision}/{file}` with ETag and
X-Repo-Commit, `/api/models/{id}[/revision/{revision}]`, `/api/models/{id}/tree/{revision}`, and errors told
by X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

RESOLVE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(
    r"/api/models/(?P<id>[^/]+(?:/[^/]+?)??)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?P<under>/.*)?)?"
)


@dataclass
class Hub:
    """The address of a running server, and what was asked of it as (method, path)."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def serve(repos: Mapping[str, Path], gated: frozenset[str] = frozenset()) -> Iterator[Hub]:
    """A hub that holds these folders under these ids ("some/model", "some/model@branch").

    `gated` ids exist and may not be read.
    """

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    Handler.gated, Handler.hub = gated, hub
    Handler.branches = {name if "@" in name else f"{name}@main": folder for name, folder in repos.items()}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    branches: dict[str, Path]
    gated: frozenset[str]
    hub: Hub
    commit = ""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path))
        match = RESOLVE.fullmatch(path) or API.fullmatch(path)
        if match is None:
            return self._error(404, "EntryNotFound", "no such address")
        repo, revision = match["id"], match["revision"] or "main"
        if repo in self.gated:
            return self._error(401, "GatedRepo", f"Access to model {repo} is restricted. You must be logged in.")
        names = [name for name in self.branches if name.split("@")[0] == repo]
        if not names:
            return self._error(401, "RepoNotFound", "Invalid username or password.")  # as the hub says it
        named = [name for name in names if revision in (name.split("@")[1], commit(name))]
        if not named:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        self.commit, folder = commit(named[0]), self.branches[named[0]]
        if match.re is RESOLVE:
            return self._file(folder / match["file"])
        return self._json(self._tree(folder) if match["what"] == "tree" else self._info(repo, folder))

    def _info(self, repo: str, folder: Path) -> object:
        files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
        return {"_id": "0", "id": repo, "sha": self.commit, "private": False, "tags": [], "siblings": files}

    def _tree(self, folder: Path) -> object:
        return [
            {"type": "file", "oid": _etag(path), "size": path.stat().st_size, "path": path.name}
            for path in sorted(folder.iterdir())
        ]

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._error(404, "EntryNotFound", "Entry not found")
        body, status = path.read_bytes(), 200
        extra = {"ETag": f'"{_etag(path)}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, total = int(wanted[1]), len(body)
            body, status = body[start : int(wanted[2] or total) + 1], 206
            extra["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{total}"
        return self._send(status, body, "application/octet-stream", extra)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), "application/json", {})

    def _error(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(status, body, "application/json", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Repo-Commit": self.commit}
        for name, value in {**fixed, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def commit(name: str) -> str:
    """The commit that a branch ("some/model@main") stands at."""
    return hashlib.sha1(name.encode()).hexdigest()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
