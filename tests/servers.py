"""Real servers on loopback, each in a process of its own: nginx, S3 (moto), and a faulty proxy."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from tests.ports import free_port

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
NO_NGINX = "nginx is not installed (Debian, Ubuntu: apt-get install nginx-light)"
BUCKET = "corpus"
# busy: 503 always.  whole: ignores ranges.  crowded: 503 beyond 100 requests/s.  slow: 2 bytes/s.
# locked: for USER with PASSWORD.  signed: for those who know the parameter sig=PASSWORD.
USER, PASSWORD = "reader", "pass-word-of-nginx"
NGINX_CONFIG = """
daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi; uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  limit_req_zone $server_port zone=crowd:1m rate=100r/s;
  server {{
    listen 127.0.0.1:{port}; root {root};
    location /busy/ {{ return 503; }}
    location /whole/ {{ alias {root}/; max_ranges 0; }}
    location /crowded/ {{ alias {root}/; limit_req zone=crowd burst=10 nodelay; }}
    location /slow/ {{ alias {root}/; limit_rate 2; }}
    location /locked/ {{ alias {root}/; auth_basic here; auth_basic_user_file {home}/users; }}
    location /signed/ {{ if ($arg_sig != {password}) {{ return 403; }} alias {root}/; }}
  }}
}}
"""


@contextmanager
def nginx(root: Path, *, home: Path) -> Iterator[str]:
    """Serves the files below `root`; yields its address."""
    assert NGINX
    port = free_port()
    config = home / "nginx.conf"
    config.write_text(NGINX_CONFIG.format(home=home, root=root, port=port, password=PASSWORD))
    (home / "users").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")
    with _running([NGINX, "-p", str(home), "-e", f"{home}/error.log", "-c", str(config)], port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def s3() -> Iterator[str]:
    """An S3 server with the empty bucket BUCKET; yields its endpoint."""
    port = free_port()
    with _running([sys.executable, "-m", "moto.server", "-p", str(port)], port):
        urlopen(Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")).close()
        yield f"http://127.0.0.1:{port}"


class FaultyProxy:
    """Passes everything on, but for the faults that it is told to make."""

    def __init__(self, address: str) -> None:
        self.address = address

    def fail(self, kind: str, *, count: int, match: str) -> None:
        """The next `count` reads of paths with `match` fail; the counters begin at 0."""
        body = json.dumps({"kind": kind, "match": match, "count": count}).encode()
        urlopen(Request(f"{self.address}/faults", data=body, method="POST")).close()

    def state(self) -> dict:
        with urlopen(f"{self.address}/faults") as answer:
            return json.loads(answer.read())


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    command = [sys.executable, "-m", "tests.faulty_proxy", upstream]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield FaultyProxy(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


@contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    """Runs a server until the end of the block, from when it accepts connections."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 30
            while True:
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert time.monotonic() < end, f"{command[0]} does not answer"
                    time.sleep(0.05)
            yield
        finally:
            process.kill()
