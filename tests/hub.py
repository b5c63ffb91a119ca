"""A small hub on loopback that speaks the Hugging Face hub's protocol, and fails on request.

A process of its own (`python tests/hub.py ROOT PORT`), that it can be killed. ROOT holds OWNER/NAME/files of data sets,
and of models, which who has the token "writer" may upload.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub:
    """Context manager that starts the server and makes it fail on request."""

    def __init__(self, root):
        self.root, self.port = root, 0

    def __enter__(self):
        self.start()
        return self

    def start(self):
        """Start the server; after a kill, on the same port."""
        command = [sys.executable, __file__, str(self.root), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.port = int(self.process.stdout.readline())
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def kill(self):
        """Kill the server in the middle of its work."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __exit__(self, *_):
        self.kill()

    def environment(self, home):
        """Environment that makes a process use this hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fail(self, pattern, times, **how):
        """Fail the next `times` requests whose path matches: status=503, retry_after=1, cut=100 (bytes), slow=1.0 (s),
        gated=True, or moved="owner/name"."""
        self._post("/_fail", {"pattern": pattern, "times": times} | how)

    def mend(self):
        """Cancel the failures that have not happened yet."""
        self._post("/_mend", {})

    def requests(self):
        """The requests so far: [method, path, range, status]."""
        with urllib.request.urlopen(f"{self.endpoint}/_requests") as answer:
            return json.load(answer)

    def _post(self, path, value):
        urllib.request.urlopen(f"{self.endpoint}{path}", json.dumps(value).encode()).close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    faults: list
    seen: list
    large: dict
    private: set

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/_fail":
            self.faults.append(json.loads(body))
            self.send(200, b"{}")
        elif self.path == "/_mend":
            self.faults.clear()
            self.send(200, b"{}")
        elif re.match("/api/(repos/create|validate-yaml)|.*/(preupload|commit)/main|.*/info/lfs/", self.path):
            self.write(body)
        else:
            self.answer(body)

    def do_PUT(self):
        self.large[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.send(200, b"")

    def write(self, body):
        """Answer the requests of an upload: create a repository, announce files, send large files, commit the rest."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("reader", "writer"):
            return self.error(401, "", "Invalid username or password.")
        if token == "reader":
            return self.error(403, "", "You don't have the rights to write.")
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = (self.root / name).exists()
            (self.root / name).mkdir(parents=True, exist_ok=True)
            if asked.get("visibility") == "private" and not there:
                self.private.add(name)
            return self.send(409 if there else 200, json.dumps({"url": f"{here}/{name}"}).encode())
        if self.path == "/api/validate-yaml":
            front = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
            wrong = [] if front else [{"message": "no metadata"}]
            return self.send(400 if wrong else 200, json.dumps({"errors": wrong, "warnings": []}).encode())
        if "/preupload/" in self.path:
            sent = [(file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular")
                    for file in json.loads(body)["files"]]  # fmt: skip
            return self.send_json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in sent]})
        if "/info/lfs/" in self.path:
            objects = json.loads(body)["objects"]
            answers = [x | {"actions": {"upload": {"href": f"{here}/_large/{x['oid']}"}}} for x in objects]
            return self.send_json({"transfer": "basic", "objects": answers})
        repo = self.root / re.match("/api/models/(.*)/commit/main", self.path)[1]
        for line in map(json.loads, body.splitlines()):
            match line:
                case {"key": "file", "value": {"path": path, "content": content}}:
                    (repo / path).write_bytes(base64.b64decode(content))
                case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                    (repo / path).write_bytes(self.large[f"/_large/{oid}"])
        sha = commit(repo)
        return self.send_json({"commitOid": sha, "commitUrl": f"{here}/{repo.relative_to(self.root)}/commit/{sha}"})

    def answer(self, body=b""):
        path = unquote(urlsplit(self.path).path)
        if path == "/_requests":
            return self.send_json(self.seen)
        for fault in self.faults:
            if fault["times"] and re.search(fault["pattern"], path):
                fault["times"] -= 1
                if not self.failed(fault, path):
                    return None
                break
        kinds = "resolve|tree|revision|paths-info"
        found = re.fullmatch(rf"(?:/api)?/(?:datasets/|models/)?([^/]+/[^/]+)(?:/({kinds})/([^/]+)/?(.*))?", path)
        repo = self.root / found[1] if found else None
        if repo is None or not repo.is_dir():
            return self.error(401, "RepoNotFound", "Invalid username or password.")
        name, kind, revision, rest = found.groups()
        sha = commit(repo)
        if revision not in (None, "main", sha):
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "resolve":
            return self.send_file(repo / rest, sha)
        if kind in (None, "revision"):
            siblings = [{"rfilename": str(file.relative_to(repo))} for file in files(repo)]
            return self.send_json(
                {"id": name, "sha": sha, "private": name in self.private, "gated": False, "siblings": siblings}
            )
        if kind == "tree":
            if rest and not (repo / rest).is_dir():
                return self.error(404, "EntryNotFound", f"{rest} does not exist")
            return self.send_json(tree(repo, repo / rest, "recursive=true" in self.path.lower()))
        wanted = re.findall(r'"paths":\s*(\[.*?\])', body.decode())
        paths = json.loads(wanted[0]) if wanted else [unquote(v) for v in re.findall(r"paths=([^&]*)", body.decode())]
        return self.send_json([entry(repo, repo / at) for at in paths if (repo / at).exists()])

    def failed(self, fault, path):
        """Cause the requested fault; return whether the request should still be answered."""
        match fault:
            case {"slow": seconds}:
                time.sleep(seconds)
                return True
            case {"gated": True}:
                self.error(401, "GatedRepo", "Access to this dataset is restricted. Please log in.")
            case {"moved": name}:
                self.send(307, b"", {"Location": re.sub(r"datasets/[^/]+/[^/]+", f"datasets/{name}", self.path)})
            case {"cut": length}:
                self.cut = length
                return True
            case {"status": status}:
                wait = {"Retry-After": str(fault["retry_after"])} if "retry_after" in fault else {}
                self.send(status, b"{}", wait)
        return False

    def send_file(self, file, sha):
        if not file.is_file():
            return self.error(404, "EntryNotFound", "Entry not found")
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.send(200, data, headers)
        start, stop = int(part[1]), min(len(data), int(part[2] or len(data)) + 1)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.send(206, data[start:stop], headers)

    def error(self, status, code, message):
        self.send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, data, headers=None):
        if not self.path.startswith("/_"):
            self.seen.append([self.command, self.path, self.headers.get("Range"), status])
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: getattr(self, "cut", None)])
        if hasattr(self, "cut"):
            del self.cut
            self.close_connection = True

    def log_message(self, *_):
        pass


def files(repo):
    return sorted(path for path in repo.rglob("*") if path.is_file())


def commit(repo):
    described = [f"{file.relative_to(repo)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files(repo)]
    return hashlib.sha1("\n".join(described).encode()).hexdigest()


def entry(repo, path):
    oid = hashlib.sha1(str(path).encode()).hexdigest()
    kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
    return {"type": kind, "oid": oid, "size": size, "path": str(path.relative_to(repo))}


def tree(repo, folder, deep):
    return [entry(repo, path) for path in sorted(folder.rglob("*") if deep else folder.iterdir())]


if __name__ == "__main__":
    Handler.root, Handler.faults, Handler.seen = Path(sys.argv[1]), [], []
    Handler.large, Handler.private = {}, set()
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
