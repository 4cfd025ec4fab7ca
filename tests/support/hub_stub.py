# SPDX-FileCopyrightText: 2026 The omniopd_trl Authors
# SPDX-License-Identifier: Apache-2.0
"""A minimal Hugging Face Hub on the loopback interface: enough to create a repository and push files to it.

with serve() as hub:
    subprocess.run(..., env={**os.environ, **hub.environment})
hub.repos["me/model"].files["README.md"]
hub.fail(503, path="/commit/", times=2)

In the process of a test, `connect(monkeypatch, hub)` takes the place of the environment.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub import HfApi, constants

TOKEN = "hf_a-token-of-the-loopback-hub"
_LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".parquet")


@dataclass
class Repo:
    """One repository: the content of its files by branch, the messages of its commits, and who may read it."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)
    private: bool = False

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]


@dataclass
class Fault:
    """An answer other than the right one: a status code, or `None` to close the connection without an answer."""

    status: int | None
    path: str
    times: int


class Hub(ThreadingHTTPServer):
    """The server, with the pushed repositories."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.unauthorized: list[str] = []
        self.received: list[bytes] = []  # the path and the body of each request
        self.faults: list[Fault] = []
        self.has_lfs = True

    def fail(self, status: int | None, path: str = "", times: int = 10**9) -> None:
        """Fail the next requests whose path contains `path`."""
        self.faults.append(Fault(status, path, times))

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


def connect(monkeypatch: Any, hub: Hub, *, pipelined: bool = False) -> None:
    """Point huggingface_hub and transformers in this process to a hub, with its token, and shorten their waits.

    Args:
        monkeypatch: pytest's fixture.
        hub: the hub.
        pipelined: whether uploads take the path of huggingface_hub with hf_xet, its default. Large files then go as
            small ones do, since this hub has no Xet storage.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not pipelined)
    hub.has_lfs = not pipelined
    monkeypatch.setattr("transformers.utils.hub._hf_api", HfApi(endpoint=hub.url))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        with self.server.lock:
            self.server.received += [self.path.encode(), body]
            for fault in self.server.faults:
                if fault.times > 0 and fault.path in path:
                    fault.times -= 1
                    if fault.status is None:
                        self.close_connection = True
                    else:
                        self._send({"error": f"Fault {fault.status}"}, fault.status)
                    return
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
    hub.repos[name] = Repo(private=request.get("visibility") == "private")
    return ({"url": f"{hub.url}/{name}", "name": name, "id": name},)


def _branch(hub: Hub, body: bytes, name: str, branch: str) -> tuple[Any, ...]:
    branches = hub.repos[name].branches
    if unquote(branch) in branches:
        return {"error": "Reference already exists"}, 409
    branches[unquote(branch)] = dict(branches["main"])
    return ({},)


def _validate(hub: Hub, body: bytes) -> tuple[Any, ...]:
    errors = [{"message": error} for error in card_errors(json.loads(body)["content"])]
    return {"errors": errors, "warnings": []}, 400 if errors else 200


def card_errors(card: str) -> list[str]:
    """What the Hub would refuse or not link in the YAML header of a model card."""
    header = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if header is None:
        return ["no header"]
    data = yaml.safe_load(header[1])
    errors = []
    texts = ("base_model", "base_model_relation", "library_name", "pipeline_tag")
    errors += [f"{key} is no string" for key in texts if not isinstance(data.get(key, ""), str)]
    for key in ("base_model", "datasets"):
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", str(value)) or value in (None, "None"):
                errors.append(f"{key} holds {value!r}, which is no id")
    if data.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        errors.append("base_model_relation is none of the Hub's")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append("tags are not strings")
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not (model["name"] and result["task"]["type"] and result["dataset"]["type"]):
                errors.append("model-index lacks a name or a type")
            if not all(isinstance(metric["value"], int | float) for metric in result["metrics"]):
                errors.append("model-index lacks a value")
    return errors


def _preupload(hub: Hub, body: bytes, name: str, revision: str) -> tuple[Any, ...]:
    def mode(path: str) -> str:
        return "lfs" if hub.has_lfs and path.endswith(_LFS_ENDINGS) else "regular"

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
    if unquote(revision) not in repo.branches:
        return {"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"}
    files = repo.branches[unquote(revision)]
    for line in filter(None, body.decode().splitlines()):
        operation = json.loads(line)
        value = operation["value"]
        match operation["key"]:
            case "header":
                repo.commits.append(value["summary"])
            case "file":
                files[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                files[value["path"]] = hub.large_files[value["oid"]]
            case "deletedFile":
                files.pop(value["path"], None)
    digest = hashlib.sha1(body).hexdigest()
    return (
        {"success": True, "commitOid": digest, "commitUrl": f"{hub.url}/{name}/commit/{digest}", "hookOutput": ""},
    )


def _info(hub: Hub, body: bytes, name: str) -> tuple[Any, ...]:
    if name not in hub.repos:
        return {"error": "Not found"}, 404, {"X-Error-Code": "RepoNotFound"}
    repo = hub.repos[name]
    siblings = [{"rfilename": path} for path in repo.files]
    info = {"_id": "0", "id": name, "modelId": name, "sha": "0" * 40, "private": repo.private, "tags": []}
    return ({**info, "siblings": siblings},)


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
    (rf"/api/models/{_NAME}/branch/(.+)", _branch),
    (rf"/api/(?:models|datasets)/{_NAME}/preupload/(.+)", _preupload),
    (rf"(?:/datasets)?/{_NAME}\.git/info/lfs/objects/batch", _large_files),
    (r"/lfs/([0-9a-f]{64})", _upload),
    (r"/lfs/verify", _verify),
    (rf"/api/(?:models|datasets)/{_NAME}/commit/(.+)", _commit),
    (rf"/api/(?:models|datasets)/{_NAME}(?:/revision/.+)?", _info),
    (rf"/api/datasets/{_NAME}/tree/([^/]+)", _tree),
    (rf"/datasets/{_NAME}/resolve/([^/]+)/(.+)", _download),
)
