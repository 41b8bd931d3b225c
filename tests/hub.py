"""A stand-in for the Hugging Face Hub in memory. It supports upload and download of folders."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """An HTTP server at `address`.

    `repositories` maps "datasets/USER/NAME" or "models/USER/NAME" to
    {"private": bool, "commits": [{path: bytes}]}. `requests` has the requests received so far, and
    `cards` the cards sent for validation.
    """

    def __init__(self):
        self.repositories, self.requests, self.cards = {}, [], []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                url = urlsplit(self.path)
                hub.requests.append(f"{self.command} {unquote(url.path)}")
                status, headers, content = hub.respond(self.command, unquote(url.path), body)
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in ({"Content-Length": len(content)} | headers).items():
                    self.send_header(name, str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_HEAD = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def files(self, name, revision="main"):
        """Return the files {path: bytes} of a repository at a revision: main or a commit."""
        commits = self.repositories[name]["commits"]
        known = (each for each in reversed(commits) if revision in ("main", _commit_id(each)))
        return next(known, None)

    def respond(self, method, path, body):
        """Return (status, headers, content) for a request; content is bytes or plain values."""
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body))
            return 200, {}, {"errors": [], "warnings": []}
        form = r"(/api)?/((?:datasets|models)/[\w.-]+/[\w.-]+)(?:/(\w+)/([^/]+)(?:/(.*))?)?"
        match = re.fullmatch(form, path)
        name, verb, revision, file = match.groups()[1:] if match else (None, None, None, None)
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        there = self.files(name, revision or "main")
        if there is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": "Invalid rev id"}
        if verb == "preupload":
            paths = [each["path"] for each in json.loads(body)["files"]]
            modes = [dict(path=each, uploadMode="regular", shouldIgnore=False) for each in paths]
            return 200, {}, {"files": modes}
        if verb == "commit":
            return self.commit(name, dict(there), body)
        if verb == "tree":
            listed = [
                dict(type="file", path=each, size=len(content), oid=_hash(content))
                for each, content in there.items()
            ]
            return 200, {}, listed
        if verb == "resolve" and file in there:
            headers = {"ETag": f'"{_hash(there[file])}"', "X-Repo-Commit": _commit_id(there)}
            return 200, headers, there[file]
        if verb in (None, "revision"):
            listed = [{"rfilename": each} for each in there]
            own = name.partition("/")[2]
            return 200, {}, dict(id=own, sha=_commit_id(there), siblings=listed, tags=[])
        return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}

    def create(self, wanted):
        name = f"{wanted.get('type', 'model')}s/{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.repositories else 200
        new = {"private": wanted.get("visibility") == "private", "commits": [{}]}
        self.repositories.setdefault(name, new)
        return status, {}, {"url": f"{self.address}/{name}"}

    def commit(self, name, changed, body):
        """Apply the operations in `body`, one per JSON line, to the files {path: bytes}."""
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del changed[line["value"]["path"]]
        self.repositories[name]["commits"].append(changed)
        url = f"{self.address}/{name.removeprefix('models/')}/commit/{_commit_id(changed)}"
        return 200, {}, {"commitOid": _commit_id(changed), "commitUrl": url}


def _hash(content):
    return hashlib.sha1(content).hexdigest()


def _commit_id(files):
    """Return 40 hexadecimal digits that identify a commit with these files."""
    content = [(path, _hash(each)) for path, each in sorted(files.items())]
    return _hash(json.dumps(content).encode())
