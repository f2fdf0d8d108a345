"""A small stand-in of the hub's routes on this machine, enough for its real client to upload and download."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories in memory.

    Attributes:
        files: contents by repository and name.
        requests: method and path of every request.
        failing: how many downloads are cut short before one is whole.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.failing = 0

    def commit(self, repo: str) -> str:
        """The commit that a repository is at: it follows from what is in it."""
        content = b"".join(name.encode() + data for name, data in sorted(self.files[repo].items()))
        return hashlib.sha1(content).hexdigest()  # git's own


@contextmanager
def running() -> Iterator[tuple[Hub, str]]:
    """The hub and its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        return

    def _answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, what: str) -> None:
        self._answer({"error": what}, 404, X_Error_Code=what)

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret":
            self._answer({"error": "no"}, 401)
        elif self.path == "/api/repos/create":
            told = json.loads(body)
            repo = f"{told.get('organization') or 'me'}/{told['name']}"
            self.hub.files.setdefault(repo, {})
            self._answer({"url": f"http://{self.headers['Host']}/{repo}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            rest = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": name, **rest} for name in named]})
        elif "/commit/" in self.path:
            repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.decode().splitlines():
                told = json.loads(line)
                if told["key"] == "file":
                    self.hub.files[repo][told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            commit = self.hub.commit(repo)
            self._answer(
                {
                    "success": True,
                    "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{commit}",
                    "commitOid": commit,
                }
            )
        else:
            self._missing("EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            repo, _, rest = path.removeprefix("/api/models/").partition("/tree/")
            repo = repo.partition("/revision/")[0]
            if repo not in self.hub.files:
                self._missing("RepoNotFound")
                return
            files = self.hub.files[repo]
            if rest:
                entries = [{"type": "file", "path": n, "oid": _oid(d), "size": len(d)} for n, d in files.items()]
                self._answer(entries)
            else:
                siblings = [{"rfilename": name} for name in files]
                self._answer({"id": repo, "sha": self.hub.commit(repo), "siblings": siblings})
            return
        repo, _, rest = path[1:].partition("/resolve/")
        data = self.hub.files.get(repo, {}).get(rest.partition("/")[2])
        if data is None:
            self._missing("EntryNotFound")
            return
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": self.hub.commit(repo)}
        if self.command == "GET" and self.hub.failing:
            self.hub.failing -= 1
            self.send_response(200)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self._answer(data, **{name.replace("-", "_"): value for name, value in headers.items()})


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()  # as git names contents
