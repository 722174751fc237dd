"""A small stand-in for the Hugging Face hub: as much of its protocol as loading or pushing a model needs.

Read in huggingface_hub 2.4 (`file_download.get_hf_file_metadata`, `_http.hf_raise_for_status`) and
transformers 5.23 (`utils.hub.cached_files`): HEAD and GET of `/{id}/resolve/{revision}/{file}` with ETag and
X-Repo-Commit, `/api/models/{id}[/revision/{revision}]`, `/api/models/{id}/tree/{revision}`, and errors told
by X-Error-Code. For pushing (`hf_api.create_repo`, `create_branch`, `create_commit`, `_commit_api`, `lfs`):
`/api/repos/create`, `/api/validate-yaml`, `/api/models/{id}/branch/{branch}`, `.../preupload/{revision}`,
`/{id}.git/info/lfs/objects/batch`, a PUT of each large file, `.../commit/{revision}`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

RESOLVE = re.compile(r"/(?P<id>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(
    r"/api/models/(?P<id>[^/]+(?:/[^/]+?)??)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?P<under>/.*)?)?"
)
WRITES = re.compile(
    r"/api/(?P<create>repos/create|validate-yaml)"
    r"|/api/models/(?P<id>[^/]+/[^/]+)/(?P<what>branch|preupload|commit)/(?P<revision>[^/]+)"
    r"|/(?P<lfs>[^/]+/[^/]+)\.git/info/lfs/objects/batch"
)
WRITE_TOKEN = "hf_abcdefghijklmnopqrstuvwx"


@dataclass
class Hub:
    """The address of a running server, and what was asked of it as (method, path)."""

    url: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    written: dict[str, dict[str, bytes]] = field(default_factory=dict)  # "some/model@branch" -> its files
    private: dict[str, bool] = field(default_factory=dict)  # the repositories that were made
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    tokens: set[str] = field(default_factory=set)  # that came with requests that write


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
        body = self._body()
        path = unquote(urlparse(self.path).path)
        match = WRITES.fullmatch(path)
        if match is None:
            return self._answer()
        self.hub.requests.append(("POST", path))
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if self.headers.get("Authorization") != f"Bearer {WRITE_TOKEN}":
            return self._error(401, "", "Invalid username or password.")
        return self._json(self._write(match, body))

    def do_PUT(self) -> None:
        body = self._body()
        digest = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.objects[digest] = body
        self._send(200, b"", "text/plain", {})

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while length := int(self.rfile.readline(), 16):
            found += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _write(self, match: re.Match[str], body: bytes) -> object:
        """Do what a request asks for that changes something; the JSON of the answer."""
        lines = [json.loads(line) for line in body.splitlines() if line]
        asked: dict[str, Any] = lines[0] if lines else {}
        if match["create"] == "repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.private.setdefault(name, asked.get("visibility") == "private")
            return {"url": f"{self.hub.url}/{name}", "name": name}
        if match["create"]:
            return {"errors": [], "warnings": []}
        if match["lfs"]:
            return {"transfer": "basic", "objects": [self._object(told) for told in asked["objects"]]}
        if match["what"] == "preupload":
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": told["path"],
                        "uploadMode": modes[told["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for told in asked["files"]
                ]
            }
        branch = self.hub.written.setdefault(f"{match['id']}@{match['revision']}", {})
        for line in lines[1:]:
            told = line["value"]
            large = line["key"] == "lfsFile"
            branch[told["path"]] = self.hub.objects[told["oid"]] if large else base64.b64decode(told["content"])
        return {"commitUrl": f"{self.hub.url}/{match['id']}/commit/abc", "commitOid": "abc", "success": True}

    def _object(self, told: dict[str, Any]) -> object:
        upload = {"href": f"{self.hub.url}/objects/{told['oid']}", "header": {}}
        return {**told, "actions": {"upload": upload}}

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
        if repo in self.hub.private and match["what"] is None:
            return self._json({"_id": "0", "id": repo, "private": self.hub.private[repo], "tags": [], "siblings": []})
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
