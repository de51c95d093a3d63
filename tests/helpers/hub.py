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
        self.repo, self.files, self.gated, self.cut, self.stall = repo, files, gated, cut, stall
        self.requests, self.stalled, self.closing = [], threading.Event(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
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

    def handler(hub):  # not self: that is the request handler below
        """The request handler of this hub."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

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
                hub.requests.append((self.command, path, dict(self.headers)))
                if not re.match(rf"/(api/models/)?{hub.repo}(/|$)", path):
                    return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="no repo")
                path = path.split(hub.repo, 1)[1]
                if path == "" or path.startswith("/revision/"):
                    if path not in ("", "/revision/main", f"/revision/{COMMIT}"):
                        return self.answer(404, X_Error_Code="RevisionNotFound")
                    files = [
                        {"rfilename": name, "size": len(data)} for name, data in hub.files.items()
                    ]
                    gated = "auto" if hub.gated else False
                    return self.answer_json(
                        {"id": hub.repo, "sha": COMMIT, "siblings": files, "gated": gated}
                    )
                if path.startswith("/tree/"):
                    return self.answer_json(
                        [
                            {"type": "file", "path": name, "size": len(data), "oid": oid(data)}
                            for name, data in hub.files.items()
                        ]
                    )
                name = path.split("/", 3)[-1]  # /resolve/REVISION/NAME
                if hub.gated:
                    message = f"Access to model {hub.repo} is restricted."
                    return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message=message)
                if name not in hub.files:
                    return self.answer(404, X_Error_Code="EntryNotFound")
                self.send_file(name)

            def send_file(self, name):
                data, start = hub.files[name], 0
                headers = {"ETag": f'"{oid(data)}"', "Accept_Ranges": "bytes"}
                if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
                    start = int(match[1])
                    headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                if self.command == "GET" and name in (hub.cut, hub.stall):
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("ETag", headers["ETag"])
                    self.end_headers()
                    self.wfile.write(data[:-1000])
                    self.wfile.flush()
                    if name == hub.stall:
                        hub.stalled.set()
                        hub.closing.wait(60)
                    hub.cut = hub.stall = None
                    self.close_connection = True
                    return
                self.answer(206 if start else 200, data[start:], **headers)

        return Handler


def oid(data: bytes) -> str:
    """A file's identity, as git counts it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
