"""A local server that speaks the hub's protocol, and misbehaves on request: for tests and for dev.kill_sweep."""

import hashlib
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "a" * 40


class Hub:
    """Files by path, and one small data set; `faults` are carried out one request at a time, then it behaves.

    A fault is a status code, "drop" (half of the body), "wrong" (other content), "drip" (a byte at a time, without end),
    or None. `drop_share` of the answers, at random, break off in the middle; `bytes_per_s` limits the speed.
    """

    def __init__(self, drop_share: float = 0.0, bytes_per_s: float = 1e12):
        self.files, self.faults, self.requests, self.dataset = {}, [], [], {}
        self.drop_share, self.random = drop_share, random.Random(0)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                if self.path.startswith("/datasets/"):
                    return self.hub_file(head=True)
                self.send_response(200)
                self.end_headers()

            def hub_file(self, head=False):
                """A file of the small data set below, as the hub serves it; 404 in the hub's words for another."""
                name = unquote(self.path.split(f"/resolve/{COMMIT}/")[-1])
                content = outer.dataset.get(name)
                self.send_response(404 if content is None else 200)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                    self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if content and not head:
                    self.wfile.write(content)

            def hub_api(self):
                """What the hub says of the data set: its commit and files, or a folder's entries."""
                if "/tree/" in self.path:
                    folder = unquote(self.path.split("?")[0].split(f"/tree/{COMMIT}")[-1]).strip("/")
                    answer = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                              for name, content in outer.dataset.items() if name.startswith(folder + "/" if folder else "")]
                else:
                    answer = {"id": "openai/gsm8k", "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                              "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": n} for n in outer.dataset]}
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def drip(self, body):
                try:
                    for i in range(len(body)):
                        self.wfile.write(body[i:i + 1])
                        threading.Event().wait(0.05)
                except OSError:  # the client has had enough
                    self.close_connection = True

            def do_GET(self):
                outer.requests.append((self.path, dict(self.headers)))
                if self.path.startswith("/api/datasets/"):
                    return self.hub_api()
                if self.path.startswith("/datasets/openai/"):
                    return self.hub_file()
                fault = outer.faults.pop(0) if outer.faults else None
                content = outer.files.get(self.path.split("?")[0])
                if isinstance(fault, int):
                    self.send_response(fault)
                    self.send_header("Retry-After", "0")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if content is None:
                    self.send_error(404)
                    return
                if "redirected" not in self.path:  # the hub redirects to its storage, hash and size on the first hop
                    self.send_response(302)
                    self.send_header("Location", self.path + "?redirected")
                    self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
                    self.send_header("X-Linked-Size", str(len(content)))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                body = content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if fault == "drop" or outer.random.random() < outer.drop_share:
                    self.wfile.write(body[:len(body) // 2])
                    self.close_connection = True
                elif fault == "drip":
                    self.drip(body)
                elif fault == "wrong":
                    self.wfile.write(b"x" * len(body))
                else:
                    for i in range(0, len(body), 8192):
                        self.wfile.write(body[i:i + 8192])
                        threading.Event().wait(min(1.0, 8192 / bytes_per_s))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *request: None  # clients are killed in the middle: no tracebacks
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
