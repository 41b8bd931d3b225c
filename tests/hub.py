"""A stand-in for the Hugging Face Hub on this machine: as much of its interface as uploading and downloading a folder
takes. What it holds is in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """`repositories`: "<datasets or models>/USER/NAME" -> {"private": bool, "commits": [{path: bytes}]}; `requests`:
    those that came; `cards`: what was sent to be validated."""

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
        """The files {path: bytes} of a repository at a revision: main, or the digits of a commit."""
        commits = self.repositories[name]["commits"]
        return next((each for each in reversed(commits) if revision in ("main", _digits(each))), None)

    def respond(self, method, path, body):
        """(status, headers, content as bytes or as plain values) for a request."""
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('type', 'model')}s/{wanted['organization']}/{wanted['name']}"
            if name in self.repositories:
                return 409, {}, {"url": f"{self.address}/{name}"}
            self.repositories[name] = {"private": wanted.get("visibility") == "private", "commits": [{}]}
            return 200, {}, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body))
            return 200, {}, {"errors": [], "warnings": []}
        match = re.fullmatch(r"(/api)?/((?:datasets|models)/[\w.-]+/[\w.-]+)(?:/(\w+)/([^/]+)(?:/(.*))?)?", path)
        name, verb, revision, file = match.groups()[1:] if match else (None, None, None, None)
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        there = self.files(name, revision or "main")
        if there is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": f"Invalid rev id: {revision}"}
        if verb == "preupload":
            asked = [each["path"] for each in json.loads(body)["files"]]
            return 200, {}, {"files": [dict(path=each, uploadMode="regular", shouldIgnore=False) for each in asked]}
        if verb == "commit":
            changed = dict(there)
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    changed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del changed[line["value"]["path"]]
            self.repositories[name]["commits"].append(changed)
            url = f"{self.address}/{name.removeprefix('models/')}/commit/{_digits(changed)}"
            return 200, {}, {"commitOid": _digits(changed), "commitUrl": url}
        if verb == "tree":
            return 200, {}, [dict(type="file", path=each, size=len(content), oid=hashlib.sha1(content).hexdigest())
                             for each, content in there.items()]  # fmt: skip
        if verb == "resolve" and file in there:
            tag = hashlib.sha1(there[file]).hexdigest()
            return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": _digits(there)}, there[file]
        if verb in (None, "revision"):
            siblings = [{"rfilename": each} for each in there]
            return 200, {}, {"id": name.partition("/")[2], "sha": _digits(there), "siblings": siblings, "tags": []}
        return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}


def _digits(files):
    """40 hexadecimal digits that stand for a commit with these files."""
    content = [(path, hashlib.sha1(each).hexdigest()) for path, each in sorted(files.items())]
    return hashlib.sha1(json.dumps(content).encode()).hexdigest()
