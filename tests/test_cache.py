"""The cache stays within its bound, is shared by processes, and survives those that are killed."""

import os
import resource
import signal
import time
from functools import partial
from hashlib import sha256
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import pytest

from data.cache import Cache
from data.workers import context
from nmm.errors import UserError

SIZE = 100_000


def content(name: str) -> bytes:
    return sha256(name.encode()).digest() * (SIZE // 32)


def fill(file: BinaryIO, *, name: str, log: Path | None = None, seconds: float = 0) -> None:
    """Write slowly, after a line in the log of downloads."""
    if log:
        with log.open("a") as lines:
            lines.write(f"{name}\n")
    half = len(content(name)) // 2
    file.write(content(name)[:half])
    time.sleep(seconds)
    file.write(content(name)[half:])


def read(cache: Cache, name: str, *, log: Path | None = None, seconds: float = 0) -> bytes:
    size = len(content(name))
    writer = partial(fill, name=name, log=log, seconds=seconds)
    with cache.open(name, size=lambda: size, fill=writer) as file:
        return file.read()


def used(directory: Path) -> int:
    """Bytes of all files; those that vanish meanwhile have none."""
    total = 0
    for entry in directory.iterdir():
        try:
            total += entry.stat().st_size
        except FileNotFoundError:
            continue
    return total


def start(target: partial) -> BaseProcess:
    spawner: BaseContext = context()
    process = spawner.Process(target=target)  # pyright: ignore[reportAttributeAccessIssue]
    process.start()
    return process


def read_all(cache: Cache, names: list[str], log: Path) -> None:
    for name in names:
        assert read(cache, name, log=log, seconds=0.01) == content(name)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


def test_the_least_recently_used_copy_goes_first(tmp_path: Path, log: Path) -> None:
    cache = Cache(str(tmp_path / "cache"), 3 * SIZE)
    cache.check(10 * SIZE, at_once_bytes=3 * SIZE)
    for name in ("a", "b", "c", "a", "d", "a", "c", "b"):
        assert read(cache, name, log=log) == content(name)
        assert used(tmp_path / "cache") <= 3 * SIZE
    assert log.read_text().split() == ["a", "b", "c", "d", "b"]


@pytest.mark.parametrize(("capacity", "downloads"), [(10, 6), (2, None), (1, None)])
def test_processes_fill_one_cache(
    capacity: int, downloads: int | None, tmp_path: Path, log: Path
) -> None:
    """Enough room: one download each. Too little: many, but never more bytes than allowed."""
    directory = tmp_path / "cache"
    cache = Cache(str(directory), capacity * SIZE)
    cache.check(6 * SIZE, at_once_bytes=SIZE)
    names = list("abcdef")
    orders = (names, names, names[::-1], names[3:] + names[:3])
    processes = [start(partial(read_all, cache, order, log)) for order in orders]
    while any(process.is_alive() for process in processes):
        assert used(directory) <= capacity * SIZE
        time.sleep(0.002)
    assert [process.exitcode for process in processes] == [0] * 4
    assert downloads in (None, len(log.read_text().split()))
    assert not list(directory.glob("*.part"))


def test_what_a_killed_process_leaves_is_removed(tmp_path: Path, log: Path) -> None:
    directory = tmp_path / "cache"
    cache = Cache(str(directory), SIZE)
    cache.check(SIZE, at_once_bytes=SIZE)
    victim = start(partial(read, cache, "a", log=log, seconds=60))
    while not log.read_text():
        time.sleep(0.01)
    assert len(list(directory.glob("*.part"))) == 1
    assert victim.pid
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert read(cache, "b") == content("b")
    assert used(directory) == len(content("b"))
    assert read(cache, "a") == content("a")


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"), SIZE)
    cache.check(SIZE, at_once_bytes=SIZE)

    def break_off(file: BinaryIO) -> None:
        file.write(b"half")
        raise UserError("the server is gone")

    with pytest.raises(UserError, match="the server is gone"):
        cache.open("a", size=lambda: SIZE, fill=break_off)
    assert used(tmp_path / "cache") == 0
    assert read(cache, "a") == content("a")


def test_a_cache_that_cannot_work_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache_dir is \S*file/x, which cannot be written"):
        Cache(str(tmp_path / "file" / "x"), SIZE).check(SIZE, at_once_bytes=SIZE)
    with pytest.raises(UserError, match=r"data.cache_gigabytes is 0.0001 but .* take 0.0002; set"):
        Cache(str(tmp_path), SIZE).check(9 * SIZE, at_once_bytes=2 * SIZE)
    with pytest.raises(UserError, match=r"whose disk has room for \S+ of the 1e\+09 gigabytes"):
        Cache(str(tmp_path), 10**20).check(10**18, at_once_bytes=SIZE)
    with pytest.raises(UserError, match=r"data.cache_gigabytes is 1e-05 but b has 0.0001; raise"):
        read(Cache(str(tmp_path), SIZE // 10), "b")


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    """A limit of the system on the size of files stands for it."""
    cache = Cache(str(tmp_path), SIZE)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
        with pytest.raises(UserError, match=r"which cannot be written \(File too large\); choose"):
            read(cache, "a")

    process = start(partial(limited))
    process.join()
    assert process.exitcode == 0
    assert not list(tmp_path.glob("*.part"))
