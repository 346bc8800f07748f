"""A stand-in of the Hugging Face hub, as far as publishing and loading a checkpoint need it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory; every commit is kept.

    Attributes:
        commits: Of each repository, from the first on: commit → name of file → content.
        requests: Methods and paths that were asked for.
        gone: Answer that there is nothing; ``/gone`` sets it.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []
        self.gone = False

    def commit(self, repository: str, files: dict[str, bytes], gone: Collection[str] = ()) -> str:
        """Add files to a repository, and leave some out; return the commit."""
        commits = self.commits[repository]
        whole = (list(commits.values())[-1] if commits else {}) | files
        whole = {name: content for name, content in whole.items() if name not in gone}
        names = b"".join(k.encode() + v for k, v in whole.items())
        oid = hashlib.sha1(names + str(len(commits)).encode()).hexdigest()
        commits[oid] = whole
        return oid

    def find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files; None where there is no such one."""
        commits = self.commits.get(repository, {})
        if revision == "main" and commits:
            revision = list(commits)[-1]
        return (revision, commits[revision]) if revision in commits else None


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, content: bytes | dict, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self) -> None:
            self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            hub.gone |= path == "/gone"
            if hub.gone:
                return self.missing()
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                repository = "/".join(parts[2:4])
                revision = parts[5] if parts[4:5] in (["revision"], ["tree"]) else "main"
                found = hub.find(repository, revision)
                if found is None:
                    return self.missing()
                oid, files = found
                if parts[4:5] == ["tree"]:
                    entries = [
                        {"type": "file", "path": name, "size": len(content), "oid": oid}
                        for name, content in files.items()
                    ]
                    return self.answer(json.dumps(entries).encode())
                siblings = [{"rfilename": name} for name in files]
                return self.answer({"id": repository, "sha": oid, "siblings": siblings})
            if "resolve" in parts:
                found = hub.find("/".join(parts[:2]), parts[3])
                name = "/".join(parts[4:])
                if found is None or name not in found[1]:
                    return self.answer({}, 404, X_Error_Code="EntryNotFound")
                content = found[1][name]
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                return self.answer(content, ETag=etag, X_Repo_Commit=found[0])
            return self.missing()

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = path.strip("/").split("/")
            if path == "/api/repos/create":
                wanted = json.loads(body)
                name = f"{wanted['organization']}/{wanted['name']}"
                exists = name in hub.commits
                if not exists:
                    hub.commits[name] = {}
                    hub.commit(name, {".gitattributes": b""})  # as the hub does
                url = {"url": f"http://{self.headers['Host']}/{name}"}
                return self.answer(url, 409 if exists else 200)
            if path == "/api/validate-yaml":
                return self.answer({"warnings": [], "errors": []})
            repository = "/".join(parts[2:4])
            if repository not in hub.commits:
                return self.missing()
            if "preupload" in parts:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for f in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if "commit" in parts:
                lines = [json.loads(line) for line in body.splitlines()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                gone = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
                oid = hub.commit(repository, files, gone)
                url = f"http://{self.headers['Host']}/{repository}/commit/{oid}"
                return self.answer({"success": True, "commitUrl": url, "commitOid": oid})
            return self.answer({})

    return Handler


@contextlib.contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """Run a hub while the block runs; yield it and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
