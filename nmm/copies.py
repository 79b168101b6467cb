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
from data.retry import NotAllowedError, NotThereError, cause_of, retry
from data.store import Store, name_of
from nmm.errors import UserError
from nmm.rundir import MANIFEST
from nmm.sums import MARKER, Sum, fault_of

COPIED = "COPIED"
# Without these a run cannot be continued, or would lose what it has told.
LOGS = ("losses", "evals", "quarantine", "skipped", "alarms")
BESIDE = (*(f"{log}.jsonl" for log in LOGS), MANIFEST)
TRIES, TIMEOUT_SECONDS = 5, 60.0  # of every object; nmm/uploads.py begins again later
THREADS = 8  # files at a time
STORE = Store(tries=TRIES, timeout_seconds=TIMEOUT_SECONDS)


def put(checkpoint: Path, url: str) -> None:
    """Copy a complete checkpoint and the logs of its run; raises UserError.

    What is there already, from the same checkpoint, is not copied again. The logs are where the run
    has started since, so that the copy tells that it went on from here.
    """
    marker = (checkpoint / MARKER).read_bytes()
    whole = {name: Sum(*found) for name, found in json.loads(marker).items()}
    beside = {path.name: path for path in (checkpoint.parents[1] / name for name in BESIDE)}
    texts = {name: path.read_bytes() for name, path in beside.items() if path.exists()}
    there = _sums(url) or {}
    has_files = bool(there) and whole.items() <= there.items()
    if has_files and there.get(MANIFEST) == _sum_of(texts.get(MANIFEST)):
        return
    if there:  # while its files are replaced, it does not exist
        _write(remote.remove, f"{url}/{COPIED}")
    if not has_files:
        with ThreadPoolExecutor(THREADS) as pool:
            wanted = ((f"{url}/{name}", checkpoint / name) for name in whole)
            list(pool.map(lambda each: _write(remote.put, *each), wanted))
    for name, text in {**texts, MARKER: marker}.items():
        _write(remote.write, f"{url}/{name}", text)
        whole[name] = Sum(len(text), zlib.crc32(text))
    _write(remote.write, f"{url}/{COPIED}", json.dumps(whole).encode())


def _sum_of(text: bytes | None) -> Sum | None:
    return None if text is None else Sum(len(text), zlib.crc32(text))


def names(url: str) -> list[str]:
    """The checkpoints of a run that the store has, oldest first; raises UserError."""
    found = sorted(name for name in _listed(url) if re.fullmatch(r"step_\d{8}", name))
    with ThreadPoolExecutor(THREADS) as pool:
        whole = pool.map(lambda name: COPIED in _listed(f"{url}/{name}"), found)
        return [name for name, is_whole in zip(found, whole, strict=True) if is_whole]


def _listed(url: str) -> set[str]:
    """What is in a folder. fsspec's own search for names would leave out what it may not list."""
    listing = partial(remote.list_sizes, url, timeout=TIMEOUT_SECONDS)
    try:
        return {name_of(path.rstrip("/")) for path in retry(listing, path=url, tries=TRIES)}
    except NotAllowedError:
        raise
    except NotThereError:
        return set()


def of_one_line(starts: dict[str, list[int]]) -> list[str]:
    """The checkpoints on the way to the newest, oldest first, of {name: first steps of its starts}.

    A run that went on from step 10 has abandoned what it had made after it, until it makes it anew:
        starts at 0          step 5   10   15   20
        starts at 0, 10           10   15'         the newest is 15', and 20 is not on the way to it
    """
    newest = max(starts, key=lambda name: (len(starts[name]), name), default=None)
    if newest is None:
        return []
    later = {name: starts[newest][len(before) :] for name, before in starts.items()}
    return sorted(name for name in starts if all(step_of(name) <= step for step in later[name]))


def step_of(name: str) -> int:
    return int(name.removeprefix("step_"))


def _starts(url: str) -> list[int]:
    """The steps that a run began at, up to the moment of a copy; [] where it does not tell."""
    path = f"{url}/{MANIFEST}"
    try:
        manifest = json.loads(STORE.read(path, start=0, stop=STORE.size(path)))
        return [int(start["step"]) for start in manifest["starts"]]
    except NotAllowedError:
        raise
    except (NotThereError, ValueError, LookupError, TypeError):
        return []


def take_back(url: str, directory: Path) -> tuple[str | None, list[str]]:
    """The newest whole copy, as a checkpoint of a run directory that has none, with its logs.

    Its name, if there are any, and what is wrong with newer ones. Raises UserError where there are
    some and none is whole.
    """
    faults: list[str] = []
    found = names(url)
    with ThreadPoolExecutor(THREADS) as pool:
        starts = pool.map(lambda name: _starts(f"{url}/{name}"), found)
        found = of_one_line(dict(zip(found, starts, strict=True)))
    for name in reversed(found):
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
    """What is wrong with a copy; if nothing is, it is a complete checkpoint afterwards.

    What an earlier try has fetched of it, before it was killed or took too long, is kept.
    """
    sums = _sums(url)
    if sums is None or MARKER not in sums:
        return f"{COPIED} cannot be read"
    checkpoint = directory / "checkpoints" / name_of(url)
    try:
        checkpoint.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(THREADS) as pool:
            faults = pool.map(lambda name: _fetch(url, name, sums[name], into=checkpoint), sums)
            fault = next(filter(None, list(faults)), None)
        if fault:
            shutil.rmtree(checkpoint)
            return fault
        for name in BESIDE:
            if name in sums and _is_behind(directory / name, _part(checkpoint, name)):
                _part(checkpoint, name).replace(directory / name)
        wanted = {_part(checkpoint, name): name for name in sums if name not in BESIDE}
        for path in checkpoint.iterdir():
            if path not in wanted:  # logs, and what was damaged here
                path.unlink()
        for part, name in sorted(wanted.items(), key=lambda each: each[1] == MARKER):
            part.replace(checkpoint / name)  # the marker last
    except OSError as error:
        raise UserError(
            f"{url} cannot be copied to {checkpoint} ({cause_of(error)}); make room there, or give "
            f"a writable run.dir."
        ) from None
    return None


def _is_behind(here: Path, copy: Path) -> bool:
    """Has a log fewer lines than its copy?

    The run goes on from the copy's step, and needs all up to it.
    """
    if not here.exists():
        return True
    lines, of_copy = (path.read_bytes().count(b"\n") for path in (here, copy))
    return here.suffix == ".jsonl" and lines < of_copy


def _fetch(url: str, name: str, expected: Sum, *, into: Path) -> str | None:
    """One file of a copy, and what is wrong with it; it goes on where an earlier try ended."""
    part = _part(into, name)
    fault = fault_of(part, expected=expected)
    begin = part.stat().st_size if part.exists() else 0
    begins = [begin, 0] if 0 < begin < expected.num_bytes else [0]
    try:
        while fault and begins:
            with part.open("ab") as file:
                file.truncate(begin := begins.pop(0))
                STORE.download(f"{url}/{name}", file, begin=begin)
            fault = fault_of(part, expected=expected)
    except NotAllowedError:
        raise
    except NotThereError:
        return f"{name} is not there"
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
    except NotAllowedError:
        raise
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
