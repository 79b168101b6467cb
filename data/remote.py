"""One request each to what lies behind a URL: size, exact byte range, names, writing; no retries.

Everything goes through fsspec, whose configuration (FSSPEC_S3_ENDPOINT_URL, FSSPEC_HTTPS_HEADERS,
...) and the environment of its libraries (AWS_*, GOOGLE_APPLICATION_CREDENTIALS) hold endpoints and
credentials.
"""

import asyncio
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.config import conf

from nmm.errors import UserError

# What speaks a scheme: the package to install, and its extra in pyproject.toml.
PACKAGES = {
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
}
# They raise exceptions of many kinds; those of mistakes of ours have another home.
NETWORK_LIBRARIES = ("fsspec", "aiohttp", "s3fs", "aiobotocore", "botocore", "gcsfs", "google")
ZERO_BYTES = 416  # the status of a range in an empty file


def is_url(path: str) -> bool:
    """Is it a URL, and no path on this machine?"""
    return "://" in path


def is_http(path: str) -> bool:
    """Is it on a web server, which answers ranges but lists nothing?"""
    return path.startswith(("http://", "https://"))


def is_fault(error: Exception) -> bool:
    """Is it a failing network, server or disk, and no mistake of ours?

    A file that is shorter than it was is no fault: no other try will be better.
    """
    home = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or is_timeout(error) or home in NETWORK_LIBRARIES


def is_timeout(error: Exception) -> bool:
    """Has a server said nothing for too long?"""
    return isinstance(error, (TimeoutError, asyncio.TimeoutError))  # one class from Python 3.11 on


def size(url: str, *, timeout: float) -> int:
    """Bytes of a file; a web server is asked for a range, which proves that it knows ranges."""
    system = _system(url, timeout=timeout)
    if is_http(url):
        return _http(system, url, start=0, stop=1, timeout=timeout)[1]
    return int(system.info(url)["size"])


def read(url: str, *, start: int, stop: int, timeout: float) -> bytes:
    """Bytes [start, stop) exactly."""
    if start == stop:
        return b""
    system = _system(url, timeout=timeout)
    if is_http(url):
        found = _http(system, url, start=start, stop=stop, timeout=timeout)[0]
    else:
        found = bytes(system.cat_file(url, start=start, end=stop))
    if len(found) != stop - start:
        raise OSError(f"{len(found)} bytes came for bytes {start}-{stop - 1}")
    return found


def glob(pattern: str, *, timeout: float) -> list[str]:
    """URLs of the objects that match."""
    scheme = pattern.partition("://")[0]
    return [f"{scheme}://{name}" for name in _system(pattern, timeout=timeout).glob(pattern)]


def list_sizes(folder: str, *, timeout: float) -> dict[str, int]:
    """URL -> bytes of the objects directly in a folder."""
    scheme = folder.partition("://")[0]
    entries = _system(folder, timeout=timeout).ls(folder, detail=True)
    return {f"{scheme}://{entry['name']}": int(entry["size"]) for entry in entries}


def write(url: str, data: bytes, *, timeout: float) -> None:
    """An object of an object store, which appears whole or not at all."""
    _system(url, timeout=timeout).pipe_file(url, data)


def put(url: str, path: Path, *, timeout: float) -> None:
    """The same with the bytes of a file, which need not fit into memory."""
    _system(url, timeout=timeout).put_file(str(path), url)


def remove(url: str, *, timeout: float) -> None:
    """An object of an object store, which is there."""
    _system(url, timeout=timeout).rm_file(url)


def _system(url: str, *, timeout: float) -> Any:
    """The file system of fsspec that speaks the scheme of `url`."""
    scheme = url.partition("://")[0]
    if scheme not in PACKAGES:
        raise UserError(f"{url} has the scheme {scheme}; use one of {', '.join(PACKAGES)}.")
    try:
        settings = repr(conf.get(scheme))
        return _connected(scheme, timeout=timeout, process=os.getpid(), settings=settings)
    except ImportError:
        package, extra = PACKAGES[scheme]
        raise UserError(
            f"{url} needs the package {package}, which is not installed; run "
            f"`pip install {package}` (the extra `{extra}` of pyproject.toml)."
        ) from None


@cache
def _connected(scheme: str, *, timeout: float, process: int, settings: str) -> Any:
    """One file system per process, with its own connections; its own retries are off: ours count.

    Other `settings` of fsspec are another file system.

    NOTE: nothing is ever dropped from this cache, and fsspec's is not used. A forked process that
    lets go of what it inherited closes it, and takes the connections out of the epoll set that it
    shares with its parent: the parent then waits for answers that it cannot see.
    """
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        limits = {"connect_timeout": timeout, "read_timeout": timeout}
        options["config_kwargs"] = {**limits, "retries": {"total_max_attempts": 1}}
    if scheme == "gs":
        options["requests_timeout"] = timeout
    system = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        system.retries = 1
    return system


def _http(
    system: AsyncFileSystem, url: str, *, start: int, stop: int, timeout: float
) -> tuple[bytes, int]:
    answer = sync(system.loop, _http_range, system, url, start, stop, timeout)
    assert answer is not None  # fsspec's types allow for it
    return answer


async def _http_range(
    system: Any, url: str, start: int, stop: int, timeout: float
) -> tuple[bytes, int]:
    """Bytes [start, stop) and the size of the whole, when the answer says that it is these.

    fsspec's own read believes any answer: a whole file, another range, an error page.
    """
    import aiohttp  # an optional package; fsspec has just imported it

    session = await system.set_session()
    options = {**system.kwargs}
    options["headers"] = {
        **options.get("headers", {}),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
    async with session.get(system.encode_url(url), **options) as answer:
        told = answer.headers.get("Content-Range", "")
        if answer.status == ZERO_BYTES and told == "bytes */0" and start == 0:
            return b"", 0
        if answer.status in (404, 410):
            raise FileNotFoundError(f"status {answer.status} {answer.reason}")
        if answer.status in (401, 403):
            raise PermissionError(f"status {answer.status} {answer.reason}")
        if answer.status == 200:
            raise OSError("the server ignores ranges and sends the whole file")
        if answer.status != 206:
            raise OSError(f"status {answer.status} {answer.reason}")
        match = re.fullmatch(rf"bytes {start}-{stop - 1}/(\d+)", told)
        if match is None:
            raise OSError(f"bytes {start}-{stop - 1} were asked for, the answer is {told!r}")
        return await answer.read(), int(match[1])
