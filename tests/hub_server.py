"""A small Hugging Face hub on this machine: what uploading a folder and downloading its files need.

``huggingface_hub`` itself is the client, so the requests are those of the real one.
"""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_tests"


class Hub(ThreadingHTTPServer):
    """``repositories``: name -> {path: content}. ``private``: names of those made private.
    ``gated``: those that ask for permission. ``asked``: the paths of all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        parts = self.path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts == ["api", "validate-yaml"]:  # the front matter of a model card
            return self._answer(200, {"errors": [], "warnings": []})
        name = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][line["value"]["path"]] = content
        url = f"{self.server.address}/{name}/commit/{COMMIT}"
        return self._answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        if name.startswith("others/"):
            return self._answer(403, {"error": "You don't have the rights to create a model there"})
        self.server.repositories.setdefault(name, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        return self._answer(200, {"url": f"{self.server.address}/{name}", "id": name})

    def do_HEAD(self) -> None:
        self._resolve()

    def do_GET(self) -> None:
        self._resolve()

    def _resolve(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/api/"):
            return self._answer(404, {})
        owner, name, kind, revision, *path = self.path.strip("/").split("/")
        repository = f"{owner}/{name}"
        if repository in self.server.gated:
            return self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if repository not in self.server.repositories:
            return self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        assert kind == "resolve"
        if revision not in ("main", COMMIT):
            return self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        content = self.server.repositories[repository].get("/".join(path))
        if content is None:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self._answer(200, content, headers)

    def _answer(
        self, status: int, body: bytes | dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextlib.contextmanager
def running_hub(cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub asks until the block ends, with its token and the folder
    ``cache``."""
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setenv("HF_TOKEN", TOKEN)
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
