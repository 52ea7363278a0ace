"""A hub on this machine: as much of the real one's API as sending, listing and fetching a few small files takes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


class FakeHub:
    """Repositories of models, and what was asked of them."""

    def __init__(self) -> None:
        self.repositories: dict[str, Files] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = False
        self.url = ""

    def commit_of(self, name: str) -> str:
        files = self.repositories[name]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def answer(self, method: str, url: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(url)
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        if self.refuses:
            return 403, {"X-Error-Message": "you have no right to write here"}, b""
        if path[:2] == ["api", "models"]:
            return self._api(method, "/".join(path[2:4]), path[4:], body, parse_qs(parts.query))
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            name = name if "/" in name else f"me/{name}"
            there = name in self.repositories
            self.repositories.setdefault(name, {})
            self.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            return _json({"url": f"{self.url}/{name}", "name": name}, 409 if there else 200)
        if path == ["api", "validate-yaml"]:
            return _json({"errors": [], "warnings": []})
        if len(path) > 4 and path[2] == "resolve":
            return self._file("/".join(path[:2]), "/".join(path[4:]))
        return 404, {}, b""

    def _api(
        self, method: str, name: str, rest: list[str], body: bytes, query: dict[str, list[str]]
    ) -> tuple[int, dict[str, str], bytes]:
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}, b""
        files = self.repositories[name]
        match rest:
            case [] | ["revision", _]:
                siblings = [{"rfilename": path} for path in sorted(files)]
                about: dict[str, Any] = {"id": name, "modelId": name, "sha": self.commit_of(name), "siblings": siblings}
                return _json(about | {"private": self.private.get(name, False), "tags": [], "downloads": 0})
            case ["preupload", _]:
                asked = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
                return _json({"files": modes})
            case ["commit", _]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "header":
                        self.messages.append(line["value"]["summary"])
                    else:
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                oid = self.commit_of(name)
                return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"})
            case ["tree", _, *_]:
                return _json([_entry(path, data) for path, data in sorted(files.items())])
            case ["paths-info", _]:
                asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
                return _json([_entry(path, files[path]) for path in asked if path in files])
            case ["refs"]:
                return _json({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": "0"}]})
            case _:
                return 404, {}, b""

    def _file(self, name: str, path: str) -> tuple[int, dict[str, str], bytes]:
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if path not in self.repositories[name]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit_of(name)}, b""
        data = self.repositories[name][path]
        tag = hashlib.sha1(data).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit_of(name), "Accept-Ranges": "bytes"}, data


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """The URL of the hub while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            status, headers, data = hub.answer(self.command, self.path, body)
            asked = self.headers.get("Range")
            if status == 200 and asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                stop = min(len(data), int(last or len(data)) + 1)
                headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
                status, data = 206, data[int(first) : stop]
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = _reply

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _json(document: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(document).encode()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
