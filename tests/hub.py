"""A stand-in of the Hugging Face hub on this machine: the parts of its HTTP interface that pushing and reading use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any

TOKEN = "hf_secret"
COMMIT = "c0" * 20
_LARGE = (".safetensors",)  # the hub keeps these files in large file storage


@dataclass
class Hub:
    """The repositories of a hub: name to files. ``log``: the requests; ``refuse``: a status for every request."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    refuse: int | None = None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _send(self, status: int, data: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.log.append(f"{self.command} {path}")
        body = self._body() if self.command in ("POST", "PUT") else b""
        if self.hub.refuse is not None:
            self._send(self.hub.refuse, {"error": "refused by the test"})
        elif path.startswith("/storage/"):
            self.hub.objects[path.removeprefix("/storage/")] = body
            self._send(200)
        elif "/resolve/" in path:
            self._resolve(path)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials in Authorization header"})
        else:
            self._api(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _resolve(self, path: str) -> None:
        repository, _, rest = path.removeprefix("/").partition("/resolve/")
        files = self.hub.repositories.get(repository)
        if files is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif (name := rest.partition("/")[2]) not in files:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            self._send(200, files[name], {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _api(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            self._send(200, {"type": "user", "name": "me", "auth": {"type": "access_token"}})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repositories:
                self._send(409, {"error": "You already created this model repo", "url": f"{hub.address}/{name}"})
                return
            hub.repositories[name] = {}
            hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
            self._send(200, {"url": f"{hub.address}/{name}", "id": name})
        elif path.endswith(".git/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            objects = [{**one, "actions": {"upload": {"href": f"{hub.address}/storage/{one['oid']}"}}} for one in asked]
            self._send(200, {"transfer": "basic", "objects": objects})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": one["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if PurePosixPath(one["path"]).suffix in _LARGE else "regular",
                }
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            self._send(200, {"files": modes})
        elif "/tree/" in path:
            files = hub.repositories[path.removeprefix("/api/models/").partition("/tree/")[0]]
            self._send(
                200, [{"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT} for name in sorted(files)]
            )
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            known = path.removeprefix("/api/models/").partition("/revision/")[0] in hub.repositories
            self._send(200, {"id": path, "sha": COMMIT}) if known else self._send(
                404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.hub.repositories[repository]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.hub.address}/{repository}/commit/{COMMIT}"
        self._send(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run an empty hub on the loopback interface."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
