"""A Hub on this machine that the real client talks to: repositories with commits, branches and pull requests.

It answers as the Hub does where the client looks: regular and large files, etags, ranges, redirects, gated and missing
repositories, metadata that is checked. Failures are asked for by `LocalHub.fail`.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

COMMIT = "a" * 40
"""The first commit of a repository that `serve` makes."""

_LARGE = (".safetensors", ".bin", ".pt", ".png", ".parquet")
_TYPES = {"models": "model", "datasets": "dataset"}


@dataclass
class Repo:
    """A repository.

    Attributes:
        private: seen by those with a token alone.
        gated: seen by all, read by nobody.
        refs: commits of branches, tags and pull requests.
        commits: files of each commit.
        log: commits in order, with their messages.
    """

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, bytes], message: str, sha: str | None = None) -> str:
        """Adds a commit to a branch."""
        sha = sha or hashlib.sha1(f"{len(self.log)} {message} {time.time_ns()}".encode()).hexdigest()
        self.commits[sha] = files
        self.log.append((sha, message))
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a name, or of itself."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by path."""
        return self.commits[self.find(revision) or ""]


@dataclass
class Failure:
    """What goes wrong with some requests.

    Attributes:
        pattern: of "METHOD path".
        status: that is answered; None drops the connection.
        times: how often; later requests are answered as usual.
        after: of a dropped connection: bytes of the body that are sent, or read, before.
        done: whether an upload or commit is done all the same, and its answer alone is lost.
    """

    pattern: str
    status: int | None = None
    times: int = 1
    after: int = 0
    done: bool = False


class LocalHub(ThreadingHTTPServer):
    """The server and what it holds.

    Attributes:
        tokens: user by token; a user ends in `:read` whose token may not write.
        repos: by type and id.
        blobs: large files by SHA-256.
        requests: "METHOD path" of all requests so far.
    """

    daemon_threads = True

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens = {"hf_test": "user"} if tokens is None else dict(tokens)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; a fault of this server is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def fail(
        self,
        pattern: str,
        status: int | None = None,
        times: int = 1,
        after: int = 0,
        done: bool = False,
    ) -> None:
        """Lets requests fail whose "METHOD path" matches."""
        self.failures.append(Failure(pattern, status, times, after, done))

    def add(
        self, repo_id: str, files: Mapping[str, bytes], kind: str = "model", sha: str | None = None
    ) -> Repo:
        """Makes a repository."""
        repo = self.repos[kind, repo_id] = Repo()
        repo.commit("main", dict(files), "initial commit", sha)
        return repo

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        """A repository that exists."""
        return self.repos[kind, repo_id]

    def count(self, pattern: str) -> int:
        """How many requests matched."""
        return sum(re.search(pattern, r) is not None for r in self.requests)

    def is_large(self, path: str, size: int) -> bool:
        """Whether a file is stored apart from the commit."""
        return path.endswith(_LARGE) or size > 10 * 2**20


def card_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The metadata at the head of README.md; none where they cannot be read."""
    text = files.get("README.md", b"").decode(errors="replace")
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        card = None
    return card if isinstance(card, dict) else {}


def tags_of(files: Mapping[str, bytes]) -> list[str]:
    """The tags that the Hub shows and searches, as it makes them of the card."""
    card = card_of(files)
    tags = list(card.get("tags", []))
    base, relation = card.get("base_model"), card.get("base_model_relation")
    for name in [base] if isinstance(base, str) else base or []:
        tags += [f"base_model:{name}", *([f"base_model:{relation}:{name}"] if relation else [])]
    tags += [card["library_name"]] if "library_name" in card else []
    tags += [f"license:{card['license']}"] if "license" in card else []
    return tags


def problems_of(content: str) -> list[str]:
    """What the Hub refuses in a card's metadata."""
    found = re.match(r"---\s*\n(.*?)\n---\s*\n", content, re.DOTALL)
    if not found:
        return []
    try:
        card = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    wrong = []
    for key, accepted in (("license", str), ("library_name", str), ("pipeline_tag", str), ("tags", list)):
        if key in card and not isinstance(card[key], accepted):
            wrong.append(f'"{key}" must be a {accepted.__name__}')
    if any(not isinstance(t, str) for t in card.get("tags") or []):
        wrong.append('"tags" must be strings')
    if card.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        wrong.append('"base_model_relation" must be one of adapter, finetune, merge, quantized')
    names = card.get("base_model", [])
    for name in [names] if isinstance(names, str) else names:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            wrong.append(f'"base_model" with value "{name}" is not valid: use a model id')
    for model in card.get("model-index") or []:
        for result in model.get("results", [{}]):
            if not {"task", "dataset", "metrics"} <= set(result) or "type" not in result["dataset"]:
                wrong.append('"model-index" results need task, dataset and metrics')
            elif not all({"type", "value"} <= set(m) for m in result["metrics"]):
                wrong.append('"model-index" metrics need type and value')
    return wrong


def git_oid(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    # -- in and out

    def do_GET(self) -> None:
        hub = self.server
        self.raw_path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        line = f"{self.command} {unquote(self.raw_path)}"
        with hub.lock:
            hub.requests.append(line)
            failure = next((f for f in hub.failures if f.times > 0 and re.search(f.pattern, line)), None)
            if failure is not None:
                failure.times -= 1
        self.failure = failure
        body = b""
        is_lost = failure is not None and failure.status is None and not failure.done
        if failure is not None and is_lost and self.command in ("PUT", "POST"):
            self.rfile.read(min(failure.after, int(self.headers.get("Content-Length") or 0)))
            self.hang_up()
            return
        if self.command in ("POST", "PUT", "DELETE"):
            body = self.read_body()
        if failure is not None and failure.status is not None:
            self.reply(failure.status, {"error": "asked for"}, {"Retry-After": "0"})
            return
        with hub.lock:
            self.route(body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)

    def reply(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failure is not None and self.failure.status is None:
            self.wfile.write(body[: self.failure.after])
            self.hang_up()
            return
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self.reply(status, {"error": message}, {**named, **(headers or {})})

    # -- who

    @property
    def user(self) -> str | None:
        given = self.headers.get("Authorization", "")
        return self.server.tokens.get(given.removeprefix("Bearer ")) if given else None

    @property
    def is_proposal(self) -> bool:
        """Whether it is a pull request, which anybody may make who has a token."""
        return self.user is not None and self.query.get("create_pr") == ["1"]

    def may_write(self, repo_id: str) -> bool:
        """Whether the user may; answers if not."""
        if self.user is None:
            self.refuse(401, "", "Invalid username or password.")
        elif self.user.endswith(":read") or self.user != repo_id.split("/")[0]:
            self.refuse(403, "", f"You don't have the rights to write to {repo_id}")
        else:
            return True
        return False

    # -- what

    def route(self, body: bytes) -> None:
        parts = [unquote(p) for p in self.raw_path.strip("/").split("/")]
        if "Authorization" in self.headers and self.user is None:
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif parts == ["api", "whoami-v2"]:
            self.whoami()
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(body))
        elif parts == ["api", "validate-yaml"]:
            wrong = problems_of(json.loads(body)["content"])
            found = [{"message": m} for m in wrong]
            self.reply(400 if wrong else 200, {"errors": found, "warnings": []})
        elif parts[:1] == ["store"]:
            self.store(parts[1], body)
        elif parts == ["verify"]:
            told = json.loads(body)
            held = self.server.blobs.get(told["oid"])
            self.reply(200 if held is not None and len(held) == told["size"] else 404, {})
        elif parts == ["api", "models"]:
            self.listing()
        elif parts[:1] == ["api"] and parts[1] in _TYPES and len(parts) >= 4:
            self.api(_TYPES[parts[1]], "/".join(parts[2:4]), parts[4:], body)
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self.batch(json.loads(body))
        else:
            kind = "dataset" if parts[0] == "datasets" else "model"
            rest = parts[1:] if kind == "dataset" else parts
            if len(rest) > 4 and rest[2] == "resolve":
                self.resolve(kind, "/".join(rest[:2]), rest[3], "/".join(rest[4:]))
            else:
                self.refuse(404, "", f"no such address: {self.raw_path}")

    def whoami(self) -> None:
        if self.user is None:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        name, _, role = self.user.partition(":")
        token = {"displayName": "t", "role": role or "write"}
        access = {"type": "access_token", "accessToken": token}
        self.reply(
            200, {"type": "user", "id": "1", "name": name, "fullname": name, "orgs": [], "auth": access}
        )

    def create(self, told: dict[str, Any]) -> None:
        kind = told.get("type", "model")
        repo_id = f"{told.get('organization') or (self.user or '').partition(':')[0]}/{told['name']}"
        if not self.may_write(repo_id):
            return
        url = f"{self.server.url}/{'' if kind == 'model' else 'datasets/'}{repo_id}"
        if (kind, repo_id) in self.server.repos:
            self.reply(409, {"error": "You already created this model repo", "url": url})
            return
        repo = self.server.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, kind)
        repo.private = told.get("visibility") == "private"
        self.reply(200, {"url": url, "name": repo_id, "id": "1"})

    def find(self, kind: str, repo_id: str) -> Repo | None:
        """A repository that this user sees; answers if there is none."""
        repo = self.server.repos.get((kind, repo_id))
        if repo is not None and (not repo.private or self.user is not None):
            return repo
        self.refuse(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        return None

    def listing(self) -> None:
        wanted = self.query.get("filter", [])
        self.reply(
            200,
            [
                self.info(repo_id, repo, repo.refs["main"])
                for (kind, repo_id), repo in self.server.repos.items()
                if kind == "model" and not repo.private and set(wanted) <= set(tags_of(repo.files()))
            ],
        )

    def info(self, repo_id: str, repo: Repo, sha: str) -> dict[str, Any]:
        files = repo.commits[sha]
        return {
            "_id": "1",
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "cardData": card_of(files),
            "tags": tags_of(files),
            "siblings": [{"rfilename": p, "size": len(c)} for p, c in sorted(files.items())],
        }

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if self.server.is_large(path, len(content)):
            pointer = self.pointer(content)
            found["oid"] = git_oid(pointer)
            sha = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"oid": sha, "size": len(content), "pointerSize": len(pointer)}
        return found

    @staticmethod
    def pointer(content: bytes) -> bytes:
        sha = hashlib.sha256(content).hexdigest()
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()

    def api(self, kind: str, repo_id: str, rest: list[str], body: bytes) -> None:
        repo = self.find(kind, repo_id)
        if repo is None:
            return
        verb, revision, path = (*rest, "", "", "")[:3]
        if len(rest) > 3:
            path = "/".join(rest[2:])
        if verb == "branch":
            if self.may_write(repo_id):
                start = json.loads(body or b"{}").get("startingPoint", "main")
                if revision in repo.refs:
                    self.refuse(409, "", "Reference already exists")
                else:
                    repo.refs[revision] = repo.find(start) or ""
                    self.reply(200, {})
            return
        if verb == "tag":
            if self.may_write(repo_id):
                repo.refs[json.loads(body)["tag"]] = repo.find(revision) or ""
                self.reply(200, {})
            return
        if verb == "refs":
            heads = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": s}
                for n, s in repo.refs.items()
                if not n.startswith("refs/")
            ]
            self.reply(200, {"branches": heads, "tags": [], "converts": []})
            return
        sha = repo.find(revision or "main")
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif verb in ("", "revision"):
            self.reply(200, self.info(repo_id, repo, sha))
        elif repo.gated:
            self.refuse(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        elif verb == "tree":
            prefix = f"{path}/" if path else ""
            files = {p: c for p, c in repo.commits[sha].items() if p.startswith(prefix)}
            if path and not files:
                self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            else:
                self.reply(200, [self.entry(p, c) for p, c in sorted(files.items())])
        elif verb == "paths-info":
            is_json = "json" in self.headers.get("Content-Type", "")
            wanted = (json.loads(body) if is_json else parse_qs(body.decode()))["paths"]
            self.reply(200, [self.entry(p, repo.commits[sha][p]) for p in wanted if p in repo.commits[sha]])
        elif verb == "preupload":
            if self.is_proposal or self.may_write(repo_id):
                self.preupload(json.loads(body), repo.commits[sha])
        elif verb == "commit":
            if self.is_proposal:
                number = 1 + sum(r.startswith("refs/pr/") for r in repo.refs)
                self.commit(repo_id, repo, f"refs/pr/{number}", sha, body)
            elif self.may_write(repo_id):
                self.commit(repo_id, repo, revision, sha, body)
        else:
            self.refuse(404, "", f"no such address: {self.raw_path}")

    def preupload(self, told: dict[str, Any], files: dict[str, bytes]) -> None:
        found = []
        for file in told["files"]:
            path, held = file["path"], files.get(file["path"])
            large = self.server.is_large(path, file["size"])
            oid = None
            if held is not None:
                oid = hashlib.sha256(held).hexdigest() if large else git_oid(held)
            mode = "lfs" if large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(200, {"files": found})

    def batch(self, told: dict[str, Any]) -> None:
        if self.user is None:
            self.refuse(401, "", "no token")
            return
        objects = []
        for wanted in told["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.server.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.server.url}/store/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.server.url}/verify", "header": {}},
                }
            objects.append(entry)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str, repo: Repo, ref: str, parent: str, body: bytes) -> None:
        files, message = dict(repo.commits[parent]), ""
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
                    return
            elif told["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    self.refuse(400, "", "a large file was not uploaded")
                    return
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif told["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = repo.commit(ref, files, message)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}"}
        if ref.startswith("refs/pr/"):
            answer["pullRequestUrl"] = f"{self.server.url}/{repo_id}/discussions/{ref.split('/')[-1]}"
        self.reply(200, {**answer, "hookOutput": ""})

    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self.find(kind, repo_id)
        if repo is None:
            return
        if repo.gated:
            self.refuse(403, "GatedRepo", f"Access to model {repo_id} is restricted")
            return
        sha = repo.find(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        content = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if content is None:
            self.refuse(404, "EntryNotFound", "Entry not found", headers)
        elif self.server.is_large(path, len(content)):
            oid = hashlib.sha256(content).hexdigest()
            self.server.blobs.setdefault(oid, content)
            headers |= {
                "X-Linked-Etag": f'"{oid}"',
                "X-Linked-Size": str(len(content)),
                "ETag": f'"{git_oid(self.pointer(content))}"',
                # Another host, as on the Hub: the client keeps the headers of this answer only then.
                "Location": f"http://localhost:{self.server.server_port}/store/{oid}",
            }
            self.reply(302, b"", headers)
        else:
            self.send_content(content, {**headers, "ETag": f'"{git_oid(content)}"'})

    def store(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                self.refuse(400, "", "the content is not what its name says")
                return
            self.server.blobs[oid] = body
            self.reply(200)
        elif oid in self.server.blobs:
            self.send_content(self.server.blobs[oid], {"ETag": f'"{oid}"'})
        else:
            self.refuse(404, "", "no such file")

    def send_content(self, content: bytes, headers: Mapping[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.reply(200, content, {**headers, "Accept-Ranges": "bytes"})
            return
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        if first >= len(content):
            self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self.reply(206, content[first : last + 1], {**headers, **span})


@contextmanager
def local_hub(tokens: Mapping[str, str] | None = None) -> Iterator[LocalHub]:
    """Runs a Hub.

    Args:
        tokens: user by token; None is `hf_test` of `user`.
    """
    with LocalHub(tokens) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@contextmanager
def serve(repo: str, files: Mapping[str, bytes], token: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Runs a Hub with one dataset repository.

    Args:
        repo: its id.
        files: contents by path.
        token: what a client must send; None asks for nothing.

    Yields:
        The address, and the list of requests so far.
    """
    with local_hub({} if token is None else {token: repo.split("/")[0]}) as hub:
        hub.add(repo, files, "dataset", COMMIT).private = token is not None
        yield hub.url, hub.requests
