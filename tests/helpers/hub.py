"""A small server that speaks the Hugging Face Hub's protocol on the loopback address.

Only what huggingface_hub asks for when it downloads a model: the model's description, the list of
its files, and the files themselves, with ranges. It can refuse (gated) and can cut a connection.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


class Hub:
    """Serves `files` (name -> bytes) as the repository `repo`; `with Hub(...) as hub:`.

    gated: answers as for a repository whose terms are not accepted. cut, stall: the name of a file
    whose first transfer breaks off, or stops and waits, shortly before its end; `stalled` is set
    then. `requests` records what was asked: (method, path, headers).
    """

    def __init__(self, repo, files, gated=False, cut=None, stall=None):
        self.repo = repo
        self.files = files
        self.gated = gated
        self.cut = cut
        self.stall = stall
        self.requests = []
        self.stalled = threading.Event()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def downloaded(self):
        """The names of the files whose contents were sent."""
        paths = (path for method, path, _ in self.requests if method == "GET")
        return {path.split("/", 5)[-1] for path in paths if "/resolve/" in path}


class Request(BaseHTTPRequestHandler):
    """Answers one request to a Hub."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        headers = {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, dict(self.headers)))
        if not re.match(rf"/(api/models/)?{self.hub.repo}(/|$)", path):
            self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="no repo")
            return

        path = path.split(self.hub.repo, 1)[1]
        if path == "" or path.startswith("/revision/"):
            self.describe(path)
        elif path.startswith("/tree/"):
            self.list_files()
        else:
            self.resolve(name=path.split("/", 3)[-1])  # /resolve/REVISION/NAME

    def describe(self, path):
        if path not in ("", "/revision/main", f"/revision/{COMMIT}"):
            self.answer(404, X_Error_Code="RevisionNotFound")
            return
        files = [{"rfilename": name, "size": len(data)} for name, data in self.hub.files.items()]
        gated = "auto" if self.hub.gated else False
        about = {"id": self.hub.repo, "sha": COMMIT, "siblings": files, "gated": gated}
        self.answer_json(about)

    def list_files(self):
        files = []
        for name, data in self.hub.files.items():
            files.append({"type": "file", "path": name, "size": len(data), "oid": oid(data)})
        self.answer_json(files)

    def resolve(self, name):
        if self.hub.gated:
            message = f"Access to model {self.hub.repo} is restricted."
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message=message)
        elif name not in self.hub.files:
            self.answer(404, X_Error_Code="EntryNotFound")
        elif self.command == "GET" and name in (self.hub.cut, self.hub.stall):
            self.break_off(name)
        else:
            self.send_file(name)

    def send_file(self, name):
        data = self.hub.files[name]
        start = 0
        headers = {"ETag": f'"{oid(data)}"', "Accept_Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if start else 200, data[start:], **headers)

    def break_off(self, name):
        """Sends all but the last 1,000 bytes, and then closes the connection or waits."""
        data = self.hub.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{oid(data)}"')
        self.end_headers()
        self.wfile.write(data[:-1000])
        self.wfile.flush()
        if name == self.hub.stall:
            self.hub.stalled.set()
            self.hub.closing.wait()
        self.hub.cut = self.hub.stall = None
        self.close_connection = True


def oid(data: bytes) -> str:
    """A file's identity, as git counts it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
