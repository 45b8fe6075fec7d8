"""A small Hub on loopback for tests: create, validate, upload, commit, list and resolve, as the real client asks for them."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1" * 40


class HubServer:
    """Keeps repositories in memory: name -> path -> content. `private` has the names of those that were created private.
    A Space's name begins with spaces/, as in its address, and a data set's with datasets/."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_POST(self) -> None:
        path, body = self._request()
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if asked.get("type") == "space":
                assert asked["sdk"] == "gradio"
                name = f"spaces/{name}"
            self.hub.repositories.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self._answer({"url": f"{self.hub.address}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/(models|spaces)/.+/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
            self._answer({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [
                o | {"actions": {"upload": {"href": f"{self.hub.address}/lfs/{o['oid']}"}}, "authenticated": True}
                for o in objects
            ]
            self._answer({"transfer": "basic", "objects": upload})
        elif found := re.fullmatch(r"/api/(?:models/)?((?:spaces/)?[^/]+/[^/]+)/commit/main", path):
            self._commit(found[1], body)
        elif found := re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)/paths-info/.+", path):
            asked = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
            self._answer([file for file in self._files(found[1]) if file["path"] in asked])
        else:
            self._missing()

    def _files(self, name: str) -> list[dict]:
        files = self.hub.repositories.get(name, {})
        folders = sorted({path.rpartition("/")[0] for path in files} - {""})
        listed = [{"type": "directory", "path": path, "oid": "1" * 40} for path in folders]
        return listed + [{"type": "file", "path": path, "size": len(files[path]), "oid": "1" * 40} for path in files]

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repository[value["path"]] = self.hub.uploads[value["oid"]]
        self._answer({"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def do_PUT(self) -> None:
        path, body = self._request()
        digest = path.removeprefix("/lfs/")
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.uploads[digest] = body
        self._answer({})

    def do_HEAD(self) -> None:
        self._resolve(with_body=False)

    def do_GET(self) -> None:
        self._resolve(with_body=True)

    def _resolve(self, with_body: bool) -> None:
        path, _ = self._request()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path):
            if found[1] in self.hub.repositories:
                names = [{"rfilename": name} for name in self.hub.repositories[found[1]]]
                return self._answer({"id": found[1], "modelId": found[1], "sha": COMMIT, "tags": [], "siblings": names})
        if found := re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)(/revision/.+|/tree/.+)?", path):
            if found[1] in self.hub.repositories:
                about = {"id": found[1].removeprefix("datasets/"), "sha": COMMIT, "tags": []}
                return self._answer(self._files(found[1]) if "/tree/" in path else about)
        found = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        content = self.hub.repositories.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            return self._missing()
        status, whole = 200, len(content)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            status, content = 206, content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(status)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(content) - 1}/{whole}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _request(self) -> tuple[str, bytes]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: dict | list) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"
