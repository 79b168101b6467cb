"""Copies of checkpoints in an object store: put there whole; nmm/take_back.py finds them again.

    s3://bucket/folder/RUN/step_00001000/state.json, ...  all files of the checkpoint
                    /losses.0a1b2c3d.jsonl, ...  the logs at that moment, with their CRC-32
                    /COPIED                      bytes and CRC-32 of these; written last
For readers a copy without its marker does not exist, and one that differs from it is left out. New
logs have other names, so that the old ones serve until the marker names the new.

    python -m nmm.copies CHECKPOINT URL     puts one there; it ends when its standard input does
"""

import argparse
import json
import os
import re
import signal
import sys
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

from data import remote
from data.retry import NotAllowedError, NotThereError, retry
from data.store import Store, name_of
from nmm.errors import UserError
from nmm.rundir import MANIFEST
from nmm.sums import MARKER, Sum

COPIED = "COPIED"
# Without these a run cannot be continued, or would lose what it has told.
LOGS = ("losses", "evals", "quarantine", "skipped", "alarms")
BESIDE = (*(f"{log}.jsonl" for log in LOGS), MANIFEST)
TRIES, TIMEOUT_SECONDS = 5, 60.0  # of every object; nmm/uploads.py begins again later
THREADS = 8  # files at a time
STORE = Store(tries=TRIES, timeout_seconds=TIMEOUT_SECONDS)


def put(checkpoint: Path, url: str, *, between: Callable[[], None] = lambda: None) -> None:
    """Copy a complete checkpoint and the logs of its run; raises UserError and OSError.

    What is there already, from the same checkpoint, is not copied again. The logs are where the run
    has started since, so that the copy tells that it went on from here. `between` is called before
    every file of the checkpoint, and ends the copying by what it raises.
    """
    marker = (checkpoint / MARKER).read_bytes()
    whole = {name: Sum(*found) for name, found in json.loads(marker).items()}
    logs = dict(map(_as_copied, filter(Path.exists, (checkpoint.parents[1] / n for n in BESIDE))))
    there = _sums_there(url)
    has_files = {**whole, MARKER: _sum_of(marker)}.items() <= there.items()
    if has_files and all(name in there for name in logs if log_of(name) == MANIFEST):
        return
    if not has_files:
        if there:  # while its files are replaced, it does not exist
            _write(remote.remove, f"{url}/{COPIED}")
        _put_files(checkpoint, url, list(whole), between=between)
        _write(remote.write, f"{url}/{MARKER}", marker)
    before: set[str] = set()
    with suppress(UserError):  # whoever may not list leaves older logs beside the copy
        before = listed(url)
    for name, text in logs.items():
        _write(remote.write, f"{url}/{name}", text)
    sums = {**whole, **{name: _sum_of(text) for name, text in {**logs, MARKER: marker}.items()}}
    _write(remote.write, f"{url}/{COPIED}", json.dumps(sums).encode())
    with suppress(UserError):  # the copy is whole with them, too
        for name in filter(log_of, before - sums.keys()):
            _write(remote.remove, f"{url}/{name}")


def _put_files(
    checkpoint: Path, url: str, files: list[str], *, between: Callable[[], None]
) -> None:
    def one(name: str) -> None:
        between()
        _write(remote.put, f"{url}/{name}", checkpoint / name)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(one, files))


def _sums_there(url: str) -> Mapping[str, Sum]:
    """Of a copy that may not be there: those who may not list are told that of a missing one."""
    try:
        return sums_of(url) or {}
    except NotAllowedError:
        return {}


def _as_copied(log: Path) -> tuple[str, bytes]:
    """The name of a log in a copy, losses.0a1b2c3d.jsonl, and what is in it."""
    text = log.read_bytes()
    return f"{log.stem}.{zlib.crc32(text):08x}{log.suffix}", text


def log_of(name: str) -> str | None:
    """The log that a file of a copy is, in copies that were made without its CRC-32, too."""
    log = re.sub(r"\.[0-9a-f]{8}(?=\.)", "", name, count=1)
    return log if log in BESIDE else None


def _sum_of(text: bytes) -> Sum:
    return Sum(len(text), zlib.crc32(text))


def listed(url: str) -> set[str]:
    """What is in a folder. fsspec's own search for names would leave out what it may not list."""
    listing = partial(remote.list_sizes, url, timeout=TIMEOUT_SECONDS)
    try:
        return {name_of(path.rstrip("/")) for path in retry(listing, path=url, tries=TRIES)}
    except NotAllowedError:
        raise
    except NotThereError:
        return set()


def sums_of(url: str) -> dict[str, Sum] | None:
    """What the marker of a copy says of all other files; None if there is none that can be read."""
    marker = f"{url}/{COPIED}"
    try:
        found = json.loads(STORE.read(marker, start=0, stop=STORE.size(marker)))
        sums = {name: Sum(*map(int, each)) for name, each in found.items()}
    except (UserError, ValueError, AttributeError, TypeError) as error:
        raise_if_unknown(error)
        return None
    # Names of files of one folder, and nothing that leads out of it.
    return sums if all(Path(name).name == name for name in sums) else None


def raise_if_unknown(error: Exception) -> None:
    """A store that is busy or forbids to look has not said that a file is missing or damaged."""
    missing = isinstance(error, NotThereError) and not isinstance(error, NotAllowedError)
    if isinstance(error, UserError) and not missing:
        raise error


def _write(action: Callable[..., None], url: str, *what: object) -> None:
    one = partial(action, url, *what, timeout=TIMEOUT_SECONDS)
    retry(one, path=url, tries=TRIES, done="written")


def _end_with_input() -> None:
    """It ends with the process that started it, however that ends."""
    while os.read(sys.stdin.fileno(), 1):  # sys.stdin's own lock would be in the way of the exit
        pass
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nmm.copies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a complete one, in its run directory")
    parser.add_argument("url", help="of its copy")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to all; the run decides
    Thread(target=_end_with_input, daemon=True).start()
    try:
        put(options.checkpoint, options.url)
    except (UserError, OSError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
