"""A web server in its own process that passes requests on and fails on purpose.

    python -m tests.faulty_proxy UPSTREAM        prints its port

`POST /faults` with {"kind": ..., "match": ..., "count": ...} makes the next `count` reads or writes
of a path that contains `match` fail; `GET /faults` tells how many are left, and those so far.
The kinds: busy (503), forbidden (403), truncate (half a body), shift (another range), lie (another
range under the name of this one), whole (ranges ignored), stall (silence), drop (no answer).
"""

import http.client
import json
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import ClassVar
from urllib.parse import urlsplit

STALL_SECONDS = 3.0
HOP_HEADERS = ("connection", "transfer-encoding", "content-length", "date", "server", "host")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    upstream = ""
    fault: ClassVar[dict] = {"kind": "", "match": "", "count": 0}
    reads: ClassVar[Counter] = Counter()
    lock: ClassVar[Lock] = Lock()

    def do_GET(self) -> None:
        if self.path == "/faults":
            state = json.dumps({"left": self.fault["count"], "reads": self.reads}).encode()
            self.answer(200, {}, state)
        else:
            self.forward(self.next_fault())

    def do_POST(self) -> None:
        if self.path == "/faults":
            Handler.fault = json.loads(self.body())
            self.reads.clear()
            self.answer(200, {}, b"")
        else:
            self.forward("")

    def do_PUT(self) -> None:
        fault = self.next_fault()
        if fault:
            self.body()  # else it would be taken for the next request
        self.forward(fault)

    def do_DELETE(self) -> None:
        self.forward("")

    def do_HEAD(self) -> None:
        self.forward("")

    def next_fault(self) -> str:
        with self.lock:
            self.reads[urlsplit(self.path).path] += 1
            if self.fault["count"] and self.fault["match"] in self.path:
                self.fault["count"] -= 1
                return self.fault["kind"]
        return ""

    def forward(self, fault: str) -> None:
        if fault == "drop":
            self.close_connection = True
        elif fault == "forbidden":
            self.answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        elif fault == "busy":
            self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        else:
            self.pass_on(fault)

    def pass_on(self, fault: str) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_HEADERS}
        asked = headers.get("Range")
        if fault == "stall":
            time.sleep(STALL_SECONDS)
        if fault == "whole":
            headers.pop("Range", None)
        if fault in ("shift", "lie") and asked:
            first, last = (int(place) for place in asked.removeprefix("bytes=").split("-"))
            headers["Range"] = f"bytes={max(0, first - 512)}-{max(0, first - 512) + last - first}"
        place = urlsplit(self.upstream)
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
        connection.request(self.command, self.path, self.body() or None, headers)
        found = connection.getresponse()
        data = found.read()
        told = {k: v for k, v in found.getheaders() if k.lower() not in HOP_HEADERS}
        if fault == "lie" and asked:
            told["Content-Range"] = (
                f"{asked.replace('=', ' ')}/{told['Content-Range'].split('/')[1]}"
            )
        length = found.getheader("Content-Length") if self.command == "HEAD" else None
        self.answer(found.status, told, data, cut=fault == "truncate", length=length)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(
        self,
        status: int,
        headers: dict,
        data: bytes,
        *,
        cut: bool = False,
        length: str | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection |= cut

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # 5, as by default, makes a crowd of clients wait for seconds

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gives up is what these tests are about."""


if __name__ == "__main__":
    Handler.upstream = sys.argv[1]
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
