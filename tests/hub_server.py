"""A small Hugging Face Hub on this machine, in memory: what `huggingface_hub` asks of the real one, over HTTP.

It answers by the Hub's published API: repository information, trees, files with their commit and ETag, and commits.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main", summary: str = "") -> str:
        listed = json.dumps([[name, hashlib.sha256(data).hexdigest()] for name, data in sorted(files.items())])
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {summary} {listed}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class FakeHub:
    """`repos` by `owner/name`; `requests`: method and path of all that was asked; `writers`: tokens that may write."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    summaries: list[str] = field(default_factory=list)
    writers: set[str] = field(default_factory=set)
    url: str = ""

    def repo(self, name: str, files: dict[str, bytes], **settings: bool) -> Repo:
        self.repos[name] = Repo(**settings)
        self.repos[name].commit(files)
        return self.repos[name]

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path.split("/resolve/")[1].split("/", 1)[1] for method, path in self.requests if "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: object = None, head: bool = False, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def allowed(self, repo: Repo | None, writing: bool = False) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if (writing or (repo is not None and repo.private)) and token not in self.hub.writers:
            # The real Hub tells strangers alike that a repository is private and that there is none.
            known = {} if writing else {"X_Error_Code": "RepoNotFound"}
            self.reply(401, {"error": "Unauthorized"}, X_Error_Message="Invalid username or password.", **known)
            return False
        if repo is None and token not in self.hub.writers:
            self.reply(401, {"error": "Unauthorized"}, X_Error_Code="RepoNotFound")
            return False
        if repo is None:
            self.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return False
        if repo.gated and token not in self.hub.writers:
            self.reply(403, {"error": "gated"}, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
            return False
        return True

    def do_HEAD(self) -> None:
        self.do_GET(head=True)

    def do_GET(self, head: bool = False) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            # Data sets are kept under their name with "datasets/" before it, as the Hub's pages have it.
            name, rest = "/".join(parts[2:4] if parts[1] == "models" else parts[1:4]), parts[4:]
            repo = self.hub.repos.get(name)
            if not self.allowed(repo):
                return
            revision = "/".join(rest[1:]) if rest[:1] in (["revision"], ["tree"]) else "main"
            inside = ""
            if rest[:1] == ["tree"] and repo.find(rest[1]):
                revision, inside = rest[1], "/".join(rest[2:])
            sha = repo.find(revision)
            if sha is not None and inside and not any(n.startswith(f"{inside}/") for n in repo.commits[sha]):
                self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            elif sha is None:
                self.reply(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            elif rest[:1] == ["tree"]:
                self.reply(200, [
                    {"type": "file", "path": n, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for n, data in sorted(repo.commits[sha].items())
                ])  # fmt: skip
            else:
                siblings = [{"rfilename": n} for n in sorted(repo.commits[sha])]
                self.reply(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})
            return
        name, (_, revision, *inside) = "/".join(parts[:2]), parts[2:]
        repo = self.hub.repos.get(name)
        if not self.allowed(repo):
            return
        data = repo.commits[repo.find(revision)].get("/".join(inside))
        if data is None:
            self.reply(404, None, head, X_Error_Code="EntryNotFound")
            return
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self.reply(200, data, head, ETag=etag, X_Repo_Commit=repo.find(revision), Accept_Ranges="bytes")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
            return
        if path == "/api/repos/create":
            wanted = json.loads(raw)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if not self.allowed(Repo(), writing=True):
                return
            url = f"{self.hub.url}/{name}"
            if name in self.hub.repos:
                self.reply(409, {"error": "You already created this model repo", "url": url})
                return
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repo(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
            self.reply(200, {"url": url, "name": name, "id": name})
            return
        name, action = "/".join(parts[2:4]), parts[4]
        repo, revision = self.hub.repos.get(name), "/".join(parts[5:])
        if not self.allowed(repo, writing=True):
            return
        if action == "branch":
            if revision in repo.branches:
                self.reply(409, {"error": "Reference already exists"})
                return
            repo.branches[revision] = repo.branches["main"]
            self.reply(200)
        elif action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(raw)["files"]
            ]
            self.reply(200, {"files": files})
        elif action == "commit":
            lines = [json.loads(line) for line in raw.splitlines()]
            files = dict(repo.commits[repo.branches[revision]])
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    self.hub.summaries.append(value["summary"])
                    if value.get("parentCommit") not in (None, repo.branches[revision]):
                        self.reply(412, {"error": "A commit has happened since"})
                        return
                elif line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = repo.commit(files, revision, lines[0]["value"]["summary"])
            self.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})
        else:
            self.reply(404)


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
