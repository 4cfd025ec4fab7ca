# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A minimal Hugging Face Hub on the loopback interface: enough to create a repository and push files to it.

with serve() as hub:
    subprocess.run(..., env={**os.environ, **hub.environment})
hub.repos["me/model"].files["README.md"]
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_a-token-of-the-loopback-hub"
_LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".parquet")


@dataclass
class Repo:
    """One repository: the content of its files, and the messages of its commits."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """The server, with the pushed repositories."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.unauthorized: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that point huggingface_hub to this server and switch its offline mode off."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub in a thread, on a free port."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        with self.server.lock:
            if self.command != "GET" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                # A real hub signs the URLs of large files, so their requests have no token.
                if not path.startswith("/lfs/"):
                    self.server.unauthorized.append(path)
                    self._send({"error": "Invalid credentials"}, 401)
                    return
            for pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match:
                    self._send(*answer(self.server, body, *match.groups()))
                    return
        self._send({"error": "Not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, since the output belongs to the test."""


def _whoami(hub: Hub, body: bytes) -> tuple[Any, ...]:
    return ({"type": "user", "name": "me", "fullname": "Me", "orgs": [], "auth": {"type": "access_token"}},)


def _create(hub: Hub, body: bytes) -> tuple[Any, ...]:
    request = json.loads(body)
    name = f"{request.get('organization') or 'me'}/{request['name'].split('/')[-1]}"
    if name in hub.repos:
        return {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409
    hub.repos[name] = Repo()
    return ({"url": f"{hub.url}/{name}", "name": name, "id": name},)


def _validate(hub: Hub, body: bytes) -> tuple[Any, ...]:
    return ({"errors": [], "warnings": []},)


def _preupload(hub: Hub, body: bytes, name: str, revision: str) -> tuple[Any, ...]:
    def mode(path: str) -> str:
        return "lfs" if path.endswith(_LFS_ENDINGS) else "regular"

    files = json.loads(body)["files"]
    answers = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False, "oid": None} for f in files]
    return ({"files": answers},)


def _large_files(hub: Hub, body: bytes, name: str) -> tuple[Any, ...]:
    def answer(item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in hub.large_files:
            return item
        upload = {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}
        verify = {"href": f"{hub.url}/lfs/verify", "header": {}}
        return {**item, "actions": {"upload": upload, "verify": verify}}

    return ({"transfer": "basic", "objects": [answer(item) for item in json.loads(body)["objects"]]},)


def _upload(hub: Hub, body: bytes, digest: str) -> tuple[Any, ...]:
    if hashlib.sha256(body).hexdigest() != digest:
        return {"error": "The content does not match its digest"}, 400
    hub.large_files[digest] = body
    return ({},)


def _verify(hub: Hub, body: bytes) -> tuple[Any, ...]:
    return {}, 200 if json.loads(body)["oid"] in hub.large_files else 404


def _commit(hub: Hub, body: bytes, name: str, revision: str) -> tuple[Any, ...]:
    repo = hub.repos[name]
    for line in filter(None, body.decode().splitlines()):
        operation = json.loads(line)
        value = operation["value"]
        match operation["key"]:
            case "header":
                repo.commits.append(value["summary"])
            case "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                repo.files[value["path"]] = hub.large_files[value["oid"]]
            case "deletedFile":
                repo.files.pop(value["path"], None)
    digest = hashlib.sha1(body).hexdigest()
    return (
        {"success": True, "commitOid": digest, "commitUrl": f"{hub.url}/{name}/commit/{digest}", "hookOutput": ""},
    )


def _info(hub: Hub, body: bytes, name: str) -> tuple[Any, ...]:
    if name not in hub.repos:
        return {"error": "Not found"}, 404, {"X-Error-Code": "RepoNotFound"}
    siblings = [{"rfilename": path} for path in hub.repos[name].files]
    return (
        {"_id": "0", "id": name, "modelId": name, "sha": "0" * 40, "private": False, "tags": [], "siblings": siblings},
    )


def _tree(hub: Hub, body: bytes, name: str, revision: str) -> tuple[Any, ...]:
    files = hub.repos[name].files.items()
    return (
        [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files
        ],
    )


def _download(hub: Hub, body: bytes, name: str, revision: str, path: str) -> tuple[Any, ...]:
    content = hub.repos[name].files[path]
    headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "0" * 40}
    return content, 200, headers


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (r"/api/whoami-v2", _whoami),
    (r"/api/repos/create", _create),
    (r"/api/validate-yaml", _validate),
    (rf"/api/(?:models|datasets)/{_NAME}/preupload/(.+)", _preupload),
    (rf"(?:/datasets)?/{_NAME}\.git/info/lfs/objects/batch", _large_files),
    (r"/lfs/([0-9a-f]{64})", _upload),
    (r"/lfs/verify", _verify),
    (rf"/api/(?:models|datasets)/{_NAME}/commit/(.+)", _commit),
    (rf"/api/(?:models|datasets)/{_NAME}(?:/revision/.+)?", _info),
    (rf"/api/datasets/{_NAME}/tree/([^/]+)", _tree),
    (rf"/datasets/{_NAME}/resolve/([^/]+)/(.+)", _download),
)
