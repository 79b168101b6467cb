"""Copies of checkpoints in an object store: put there whole, found, and taken back.

    s3://bucket/folder/RUN/step_00001000/state.json, ...    all files of the checkpoint
                                        /losses.jsonl, ...  the logs as they were at that moment
                                        /COPIED             bytes and CRC-32 of these; written last
For readers a copy without its marker does not exist, and one that differs from it is left out.

    python -m nmm.copies CHECKPOINT URL     puts one there; it ends when its standard input does
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Thread

from data import remote
from data.retry import NotThereError, cause_of, retry
from data.store import Store, name_of
from nmm.errors import UserError
from nmm.sums import MARKER, Sum, fault_of

COPIED = "COPIED"
# Without these a run cannot be continued, or would lose what it has told.
LOGS = ("losses", "evals", "quarantine", "skipped", "alarms")
BESIDE = (*(f"{log}.jsonl" for log in LOGS), "manifest.json")
TRIES, TIMEOUT_SECONDS = 5, 60.0  # of every object; nmm/uploads.py begins again later
THREADS = 8  # files at a time
STORE = Store(tries=TRIES, timeout_seconds=TIMEOUT_SECONDS)


def put(checkpoint: Path, url: str) -> None:
    """Copy a complete checkpoint and the logs of its run; raises UserError.

    What is there already, from the same checkpoint, is not copied again.
    """
    marker = (checkpoint / MARKER).read_bytes()
    whole = {name: Sum(*found) for name, found in json.loads(marker).items()}
    there = _sums(url) or {}
    if there and whole.items() <= there.items():
        return
    if there:  # while its files are replaced, it does not exist
        _write(remote.remove, f"{url}/{COPIED}")
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: _write(remote.put, f"{url}/{name}", checkpoint / name), whole))
    beside = {path.name: path for path in (checkpoint.parents[1] / name for name in BESIDE)}
    texts = {name: path.read_bytes() for name, path in beside.items() if path.exists()}
    for name, text in {**texts, MARKER: marker}.items():
        _write(remote.write, f"{url}/{name}", text)
        whole[name] = Sum(len(text), zlib.crc32(text))
    _write(remote.write, f"{url}/{COPIED}", json.dumps(whole).encode())


def names(url: str) -> list[str]:
    """The checkpoints of a run that the store has, oldest first; raises UserError."""
    pattern = f"{url}/step_*/{COPIED}"
    listing = partial(remote.glob, pattern, timeout=TIMEOUT_SECONDS)
    found = {path.split("/")[-2] for path in retry(listing, path=url, tries=TRIES)}
    return sorted(name for name in found if re.fullmatch(r"step_\d{8}", name))


def take_back(url: str, directory: Path) -> tuple[str | None, list[str]]:
    """The newest whole copy, as a checkpoint of a run directory that has none, with its logs.

    Its name, if there are any, and what is wrong with newer ones. Raises UserError where there are
    some and none is whole.
    """
    faults: list[str] = []
    for name in reversed(names(url)):
        fault = _take(f"{url}/{name}", directory)
        if fault is None:
            return name, [f"{fault}: going on from {name}" for fault in faults]
        faults.append(f"{url}/{name} is damaged ({fault})")
    if faults:
        raise UserError(
            f"{faults[0]}, and no other copy is whole; restore {url}, or start another run with "
            f"run.name=NEW."
        )
    return None, []


def _take(url: str, directory: Path) -> str | None:
    """What is wrong with a copy; if nothing is, it is a complete checkpoint afterwards."""
    sums = _sums(url)
    if sums is None or MARKER not in sums:
        return f"{COPIED} cannot be read"
    checkpoint = directory / "checkpoints" / name_of(url)
    try:
        shutil.rmtree(checkpoint, ignore_errors=True)  # what a kill left of an earlier try
        checkpoint.mkdir(parents=True)
        with ThreadPoolExecutor(THREADS) as pool:
            faults = pool.map(lambda name: _fetch(url, name, sums[name], into=checkpoint), sums)
            fault = next(filter(None, list(faults)), None)
        if fault:
            shutil.rmtree(checkpoint)
            return fault
        for name in BESIDE:
            if name in sums and not (directory / name).exists():
                _part(checkpoint, name).replace(directory / name)
        for name in (*(sums.keys() - {*BESIDE, MARKER}), MARKER):
            _part(checkpoint, name).replace(checkpoint / name)
        for name in BESIDE:
            _part(checkpoint, name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{url} cannot be copied to {checkpoint} ({cause_of(error)}); make room there, or give "
            f"a writable run.dir."
        ) from None
    return None


def _fetch(url: str, name: str, expected: Sum, *, into: Path) -> str | None:
    """One file of a copy, and what is wrong with it."""
    part = _part(into, name)
    try:
        with part.open("wb") as file:
            STORE.download(f"{url}/{name}", file)
    except NotThereError:
        return f"{name} is not there"
    fault = fault_of(part, expected=expected)
    return fault and fault.replace(part.name, name)


def _part(checkpoint: Path, name: str) -> Path:
    """Until all are there, no file has its name."""
    return checkpoint / f"{name}.part"


def _sums(url: str) -> dict[str, Sum] | None:
    """What the marker of a copy says of all other files; None if there is none that can be read."""
    marker = f"{url}/{COPIED}"
    try:
        found = json.loads(STORE.read(marker, start=0, stop=STORE.size(marker)))
        sums = {name: Sum(*map(int, each)) for name, each in found.items()}
    except (NotThereError, ValueError, AttributeError, TypeError):
        return None
    # Names of files of one folder, and nothing that leads out of it.
    return sums if all(Path(name).name == name for name in sums) else None


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
    except UserError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
