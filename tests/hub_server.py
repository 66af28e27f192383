"""A Hugging Face Hub on loopback with the parts of its protocol that the tests use, and with faults on request.

A model's repository is named `owner/name`, a data set's `datasets/owner/name`.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

FaultKind = Literal["status", "cut", "reset", "truncate", "flip", "hang", "lose"]
LFS_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".onnx", ".h5", ".npz", ".parquet", ".zip")
LFS_SIZE = 10 * 1024**2
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


@dataclass(frozen=True)
class User:
    """Owner of a token, with the role of the token and in each organization: read or write."""

    name: str
    role: str
    orgs: Mapping[str, str]

    def may_read(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and (namespace == self.name or self.orgs.get(namespace) in {"write", "admin"})


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit. An LFS file is a pointer in Git that names the content by its sha256."""

    data: bytes = field(repr=False)
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @cached_property
    def blob_id(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def lfs_info(self, key: str) -> dict[str, Any]:
        """Return the section "lfs" of a listing, with the hash under the key "oid" or "sha256"."""
        info = {key: self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {"lfs": info} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    """An immutable state of all files, with its parent."""

    files: Mapping[str, StoredFile]
    message: str
    parent: "Commit | None"
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @cached_property
    def sha(self) -> str:
        listing = [(path, file.blob_id) for path, file in sorted(self.files.items())]
        parent = self.parent.sha if self.parent else ""
        return hashlib.sha1(repr((parent, self.message, self.date, listing)).encode()).hexdigest()

    def history(self) -> list["Commit"]:
        return [self, *(self.parent.history() if self.parent else [])]


@dataclass
class Repo:
    """A model's or a data set's repository."""

    name: str
    private: bool
    gated: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    announced: dict[str, int] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.name.removeprefix("datasets/").partition("/")[0]

    def at(self, revision: str) -> Commit:
        found = self.branches.get(revision) or self.commits.get(revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def commit(self, branch: str, files: Mapping[str, StoredFile], message: str) -> Commit:
        parent = self.branches.get(branch)
        if parent is None and self.commits:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        new = Commit(dict(files), message, parent)
        self.branches[branch] = self.commits[new.sha] = new
        self.objects |= {file.sha256: file.data for file in files.values() if file.lfs}
        return new


@dataclass
class Answer:
    """Status, headers and body of an answer."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """An answer that the client turns into an exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: Any) -> None:
        super().__init__(message)
        plain = message.encode("ascii", "replace").decode()  # the only characters in a header
        headers = {"X-Error-Message": plain} | ({"X-Error-Code": code} if code else {})
        self.answer = as_json({"error": message, **more}, status, headers)


@dataclass
class Fault:
    """A fault of the next requests that match."""

    kind: FaultKind
    match: re.Pattern[str]
    times: int
    status: int
    headers: Mapping[str, str]
    seconds: float
    after: int | None

    def spoil(self, body: bytes) -> bytes:
        """Return the body as it is sent; "cut" and "reset" announce the true length."""
        place = len(body) // 2 if self.after is None else self.after
        if self.kind == "flip" and body:
            return body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        return body[:place] if self.kind in {"cut", "reset", "truncate"} else body


@dataclass
class Request:
    """A request with the user that its token belongs to."""

    hub: "HubServer"
    method: str
    query: dict[str, list[str]]
    headers: "Message[str, str]"  # finds a name in upper or lower case
    body: bytes
    user: User | None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def readable(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not (self.user and self.user.may_read(repo.namespace))):
            message = "Repository not found" if self.user else "Invalid username or password."
            raise HubError(404 if self.user else 401, message, "RepoNotFound")
        return repo

    def opened(self, name: str) -> Repo:
        """Return a repository whose files may also be read."""
        repo = self.readable(name)
        if repo.gated and not (self.user and self.user.may_read(repo.namespace)):
            why = "you are not in the authorized list." if self.user else "you must be authenticated. Please log in."
            raise HubError(403 if self.user else 401, f"Access to model {name} is restricted and {why}", "GatedRepo")
        return repo

    def writable(self, name: str) -> Repo:
        repo = self.readable(name)
        if self.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if self.user.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not self.user.may_write(repo.namespace):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo


Endpoint = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []


def route(method: str, path: str) -> Callable[[Endpoint], Endpoint]:
    """Register a function for a path; the path's {fields} become its arguments."""
    fields = {"repo": "(?:datasets/)?[^/]+(?:/[^/]+)?", "path": ".+"}
    pattern = re.sub(r"{(\w+)}", lambda match: f"(?P<{match[1]}>{fields.get(match[1], '[^/]+')})", path)

    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


@route("GET", "/api/whoami-v2")
def who_am_i(request: Request) -> Answer:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": request.user.role}
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in request.user.orgs.items()]
    auth = {"type": "access_token", "accessToken": token}
    return as_json({"type": "user", "name": request.user.name, "orgs": orgs, "auth": auth})


@route("POST", "/api/repos/create")
def create_repo(request: Request) -> Answer:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    wanted = request.json
    namespace = wanted.get("organization") or request.user.name
    name = f"{namespace}/{wanted['name']}"
    url = f"{request.hub.endpoint}/{name}"
    if not request.user.may_write(namespace):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    if name in request.hub.repos:
        raise HubError(409, "You already created this model repo", url=url)
    request.hub.add_repo(name, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    return as_json({"url": url, "name": name})


@route("GET", "/api/models/{repo}/auth-check")
def check_read(request: Request, repo: str) -> Answer:
    request.opened(repo)
    return as_json({})


@route("GET", "/api/models/{repo}/revision/{revision}")
@route("GET", "/api/models/{repo}")
def model_info(request: Request, repo: str, revision: str = "main") -> Answer:
    found = request.readable(repo)
    commit = found.at(revision)
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if request.query.get("blobs"):
        for sibling in siblings:
            file = commit.files[sibling["rfilename"]]
            sibling |= {"size": len(file.data), "blobId": file.blob_id, **file.lfs_info("sha256")}
    about = {"id": repo, "modelId": repo, "author": found.namespace, "sha": commit.sha, "lastModified": commit.date}
    state = {"private": found.private, "gated": "manual" if found.gated else False, "disabled": False}
    counts = {"downloads": 0, "likes": 0, "tags": [], "createdAt": commit.history()[-1].date}
    return as_json({**about, **state, **counts, "siblings": siblings})


def entry(path: str, commit: Commit) -> dict[str, Any]:
    """Return a file's or folder's entry in a listing."""
    if path not in commit.files:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    file = commit.files[path]
    return {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.data), **file.lfs_info("oid")}


def folders(paths: Iterable[str]) -> set[str]:
    return {path[:place] for path in paths for place, letter in enumerate(path) if letter == "/"}


@route("GET", "/api/models/{repo}/tree/{revision}")
@route("GET", "/api/models/{repo}/tree/{revision}/{path}")
def list_tree(request: Request, repo: str, revision: str, path: str = "") -> Answer:
    commit = request.readable(repo).at(revision)
    start = f"{path}/" if path else ""
    below = [name for name in {*commit.files, *folders(commit.files)} if name.startswith(start)]
    if path and not below:
        raise HubError(404, f'"{path}" does not exist on "{revision}"', "EntryNotFound")
    if request.query.get("recursive", ["false"])[0].lower() != "true":
        below = [name for name in below if "/" not in name.removeprefix(start)]
    return as_json([entry(name, commit) for name in sorted(below)])


@route("POST", "/api/models/{repo}/paths-info/{revision}")
def paths_info(request: Request, repo: str, revision: str) -> Answer:
    commit = request.readable(repo).at(revision)
    known = {*commit.files, *folders(commit.files)}
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return as_json([entry(path, commit) for path in wanted if path in known])


@route("POST", "/api/models/{repo}/branch/{branch}")
def create_branch(request: Request, repo: str, branch: str) -> Answer:
    found = request.writable(repo)
    if branch in found.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{branch}")
    if branch.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {branch}")
    found.branches[branch] = found.at(request.json.get("startingPoint", "main"))
    return as_json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Answer:
    """Accept anything that starts like a mapping: the standard library has no YAML parser."""
    header = re.match(r"---\s*\n(.*?)^---\s*$", request.json["content"], re.DOTALL | re.MULTILINE)
    lines = [line for line in header[1].splitlines() if line.strip() and line[0] != "#"] if header else []
    if lines and not re.match(r"[\w\"'.-]+\s*:(\s|$)|{", lines[0]):
        errors = [{"message": '"metadata" must be of type object'}]
        return as_json({"errors": errors, "warnings": []}, 400)
    warnings = [] if lines else [{"message": "empty or missing yaml metadata in repo card"}]
    return as_json({"errors": [], "warnings": warnings})


@route("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(request: Request, repo: str, revision: str) -> Answer:
    files = request.writable(repo).at(revision).files
    answers = []
    for asked in request.json["files"]:
        path, old = asked["path"], files.get(asked["path"])
        lfs = request.hub.upload_mode == "auto" and is_lfs(path, asked["size"])
        known = {"oid": old.etag} if old else {}
        answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **known})
    return as_json({"files": answers})


@route("POST", r"/{repo}\.git/info/lfs/objects/batch")
def lfs_batch(request: Request, repo: str) -> Answer:
    found = request.writable(repo)
    objects = []
    for wanted in request.json["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in found.objects:
            found.announced[wanted["oid"]] = wanted["size"]
            upload = {"href": f"{request.hub.storage}/cdn/{repo}/{wanted['oid']}"}
            verify = {"href": f"{request.hub.endpoint}/{repo}.git/info/lfs/objects/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return as_json({"transfer": "basic", "objects": objects})


@route("POST", r"/{repo}\.git/info/lfs/objects/verify")
def lfs_verify(request: Request, repo: str) -> Answer:
    if request.json["oid"] not in request.writable(repo).objects:
        raise HubError(404, "The object has not been uploaded")
    return as_json({})


@route("PUT", "/cdn/{repo}/{oid}")
def lfs_upload(request: Request, repo: str, oid: str) -> Answer:
    found = request.hub.repos[repo]
    if found.announced.get(oid) != len(request.body) or hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content is not what was announced")
    found.objects[oid] = request.body
    return Answer()


@route("POST", "/api/models/{repo}/commit/{revision}")
def make_commit(request: Request, repo: str, revision: str) -> Answer:
    found = request.writable(repo)
    if revision not in found.branches:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    files = dict(found.at(revision).files)
    for operation in operations:
        files[operation["value"]["path"]] = uploaded(operation["key"], operation["value"], found)
    oid = found.commit(revision, files, header["value"]["summary"]).sha
    return as_json({"success": True, "commitOid": oid, "commitUrl": f"{request.hub.endpoint}/{repo}/commit/{oid}"})


def uploaded(key: str, value: dict[str, Any], repo: Repo) -> StoredFile:
    """Return the file of one operation of a commit, whose content is in the commit or was uploaded before."""
    if key == "file":
        return StoredFile(base64.b64decode(value["content"]), lfs=False)
    if value["oid"] not in repo.objects:
        raise HubError(400, f"LFS pointer pointed to a file that does not exist: {value['oid']}")
    return StoredFile(repo.objects[value["oid"]], lfs=True)


@route("HEAD", "/{repo}/resolve/{revision}/{path}")
@route("GET", "/{repo}/resolve/{revision}/{path}")
def resolve(request: Request, repo: str, revision: str, path: str) -> Answer:
    commit = request.opened(repo).at(revision)
    headers = {"X-Repo-Commit": commit.sha}
    file = commit.files.get(path)
    if file is None:
        missing = HubError(404, "Entry not found", "EntryNotFound")
        missing.answer.headers |= headers
        raise missing
    if not file.lfs:
        return content(request, file.data, headers | {"ETag": f'"{file.etag}"'})
    linked = {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
    location = f"{request.hub.storage}/cdn/{repo}/{file.sha256}?filename={quote(path)}"
    return Answer(302, b"", headers | linked | {"Location": location})


@route("GET", "/cdn/{repo}/{oid}")
def lfs_download(request: Request, repo: str, oid: str) -> Answer:
    return content(request, request.hub.repos[repo].objects[oid], {"ETag": f'"{oid}"'})


def content(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """Return the content of a file, or the requested range of it."""
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Answer(200, data, headers)
    first, last = (int(asked[1]), int(asked[2] or len(data))) if asked[1] else (len(data) - int(asked[2]), len(data))
    if first >= len(data):
        return Answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
    part = data[max(first, 0) : last + 1]
    span = f"bytes {max(first, 0)}-{max(first, 0) + len(part) - 1}/{len(data)}"
    return Answer(206, part, headers | {"Content-Range": span})


class _Handler(BaseHTTPRequestHandler):
    """Read a request, have the Hub answer it, and send the answer with its fault."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        hub, body = self.server.hub, self._read_body()
        fault = hub._take_note(self.command, self.path, {name.lower(): text for name, text in self.headers.items()})
        kind = fault.kind if fault else None
        if fault and kind == "hang" and hub._closing.wait(fault.seconds):
            self.close_connection = True
            return
        if fault and kind == "status":
            answer = as_json({"error": f"Fault {fault.status}"}, fault.status, fault.headers)
        else:
            answer = hub._answer(self.command, self.path, self.headers, body)
        breaks = kind in {"cut", "reset", "lose"}
        empty = self.command == "HEAD" or not answer.body
        if not breaks or (kind != "lose" and not empty):
            self._send(answer, fault)
        self.close_connection |= breaks
        if kind == "reset":
            self._reset()

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815  (http.server's names)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        body = fault.spoil(answer.body) if fault else answer.body
        partial = fault is not None and fault.kind in {"cut", "reset"}
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body if partial else body)))
        self.send_header("X-Request-Id", uuid.uuid4().hex)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """Reset the connection. The socket closes only after the file object."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()


class _Server(ThreadingHTTPServer):
    """Know the connections, so that closing the server also ends those that are kept alive."""

    daemon_threads = True

    def __init__(self, hub: "HubServer") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()
        for connection in list(self.connections):
            self.shutdown_request(connection)


class HubServer:
    """A Hub with users and repositories that answers at `endpoint` until it is closed.

    LFS files are served at another port, `storage`, like the CDN of the real Hub, which must not receive the token.
    All requests are logged in `requests` (method, path with query), and their headers in `headers` (names in lower
    case).
    """

    def __init__(self) -> None:
        self.upload_mode: Literal["auto", "regular"] = "auto"
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self._users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._servers = (_Server(self), _Server(self))
        self.endpoint, self.storage = (server.url for server in self._servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering, including requests that hang."""
        self._closing.set()
        for server in self._servers:
            server.stop()

    def add_user(self, token: str, name: str, role: str = "write", orgs: Mapping[str, str] | None = None) -> None:
        """Add a token of a user; `orgs` maps each organization to the user's role."""
        with self._lock:
            self._users[token] = User(name, role, dict(orgs or {}))

    def add_repo(self, repo_id: str, private: bool = False, gated: bool = False) -> None:
        """Add a repository with a first commit."""
        with self._lock:
            repo = self.repos[repo_id] = Repo(repo_id, private, gated)
            repo.commit("main", {".gitattributes": StoredFile(GIT_ATTRIBUTES, lfs=False)}, "initial commit")

    def commit(
        self, repo_id: str, files: Mapping[str, bytes | None], message: str = "Change files", revision: str = "main"
    ) -> str:
        """Commit files to a branch (None deletes one) and return the commit's hash."""
        with self._lock:
            repo = self.repos[repo_id]
            changed = {
                path: StoredFile(data, lfs=self.upload_mode == "auto" and is_lfs(path, len(data)))
                for path, data in files.items()
                if data is not None
            }
            kept = {path: file for path, file in repo.at(revision).files.items() if path not in files}
            return repo.commit(revision, kept | changed, message).sha

    def lines(self, part: str = "") -> list[str]:
        """Return the requests that contain a text, each as "METHOD /path?query"."""
        return [line for method, path in self.requests if part in (line := f"{method} {path}")]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the content of all files."""
        with self._lock:
            return {path: file.data for path, file in self.repos[repo_id].at(revision).files.items()}

    def downloads(self, repo_id: str) -> list[str]:
        """Return the large files of a repository that were downloaded, in the order of the requests."""
        targets = [urlsplit(path) for method, path in self.requests if method == "GET"]
        fetched = [url for url in targets if url.path.startswith(f"/cdn/{repo_id}/")]
        return [parse_qs(url.query)["filename"][0] for url in fetched]

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Return the hashes of the commits, newest first."""
        with self._lock:
            return [commit.sha for commit in self.repos[repo_id].at(revision).history()]

    def fault(
        self,
        kind: FaultKind,
        match: str,
        times: int = 1,
        *,
        status: int = 500,
        headers: Mapping[str, str] | None = None,
        seconds: float = 3600,
        after: int | None = None,
    ) -> None:
        """Add a fault to the next requests whose "METHOD /path?query" matches a regular expression.

        "status": an error status, and the request has no effect. "cut", "reset": the connection is closed or reset
        after `after` bytes of the body (by default half). "truncate": the body ends there, and so does its announced
        length. "flip": one bit of the byte there is wrong. "hang": the request starts after `seconds`. "lose": the
        request has its effect, but the connection is closed without an answer.
        """
        with self._lock:
            pattern = re.compile(match)
            self.faults.append(Fault(kind, pattern, times, status, headers or {}, seconds, after))

    def _take_note(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        """Log a request and return its fault."""
        with self._lock:
            self.requests.append((method, path))
            self.headers.append(headers)
            for fault in self.faults:
                if fault.times > 0 and fault.match.search(f"{method} {path}"):
                    fault.times -= 1
                    return fault
        return None

    def _answer(self, method: str, target: str, headers: "Message[str, str]", body: bytes) -> Answer:
        """Find the endpoint of a request and call it."""
        url = urlsplit(target)
        path = url.path.replace("/api/datasets/", "/api/models/datasets/", 1)
        with self._lock:
            try:
                user = self._user(headers.get("Authorization"), path)
                request = Request(self, method, parse_qs(url.query), headers, body, user)
                for asked, pattern, endpoint in ROUTES:
                    if asked == method and (match := pattern.fullmatch(path)):
                        return endpoint(request, **{name: unquote(value) for name, value in match.groupdict().items()})
                raise HubError(404, "Sorry, we can't find the page you are looking for.")
            except HubError as error:
                return error.answer
            except (KeyError, TypeError, ValueError) as error:
                return HubError(400, f"Malformed request: {error!r}").answer

    def _user(self, authorization: str | None, path: str) -> User | None:
        if authorization is None:
            return None
        if path.startswith("/cdn/"):
            raise HubError(400, "Only one auth mechanism allowed")  # as S3 does: the token must not leave the Hub
        user = self._users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user
