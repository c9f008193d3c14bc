"""A dataset repository behind the Hub's protocol, on this machine, for the real client."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@contextmanager
def serve(repo: str, files: Mapping[str, bytes], token: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Runs a server that knows one dataset repository.

    Args:
        repo: its id.
        files: contents by path.
        token: what a client must send; None asks for nothing.

    Yields:
        The address, and the list of requests so far.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            allowed = token is None or self.headers.get("authorization") == f"Bearer {token}"
            api = f"/api/datasets/{repo}"
            if not allowed or not path.startswith((api, f"/datasets/{repo}/")):
                self.reply(404, b'{"error": "no"}', {"X-Error-Code": "RepoNotFound"}, body)
            elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in files]
                facts = {
                    "id": repo,
                    "sha": COMMIT,
                    "private": False,
                    "gated": False,
                    "siblings": siblings,
                    "tags": [],
                }
                self.reply(200, json.dumps(facts).encode(), {"Content-Type": "application/json"}, body)
            elif path.startswith(api):
                self.reply(404, b'{"error": "no"}', {"X-Error-Code": "RevisionNotFound"}, body)
            else:
                name = path.removeprefix(f"/datasets/{repo}/resolve/{COMMIT}/")
                content = files.get(name)
                if content is None:
                    self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
                else:
                    etag = hashlib.sha1(content).hexdigest()
                    headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Content-Type": "text/plain"}
                    self.reply(200, content, headers, body)

        def reply(self, status: int, content: bytes, headers: Mapping[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

    with Quiet(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", requests
        finally:
            server.shutdown()
            thread.join()
