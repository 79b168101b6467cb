"""Copies of checkpoints in an object store: put there whole, found, and taken back.

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
from itertools import accumulate
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
Start = tuple[str, int]  # of a run: when, and at which step
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
    if has_files and all(name in there for name in logs if _log_of(name) == MANIFEST):
        return
    if not has_files:
        if there:  # while its files are replaced, it does not exist
            _write(remote.remove, f"{url}/{COPIED}")
        _put_files(checkpoint, url, list(whole), between=between)
        _write(remote.write, f"{url}/{MARKER}", marker)
    for name, text in logs.items():
        _write(remote.write, f"{url}/{name}", text)
    sums = {**whole, **{name: _sum_of(text) for name, text in {**logs, MARKER: marker}.items()}}
    _write(remote.write, f"{url}/{COPIED}", json.dumps(sums).encode())
    for name in there.keys() - sums.keys():
        if _log_of(name):
            with suppress(UserError):  # the copy is whole with it, too
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
        return _sums(url) or {}
    except NotAllowedError:
        return {}


def _as_copied(log: Path) -> tuple[str, bytes]:
    """The name of a log in a copy, losses.0a1b2c3d.jsonl, and what is in it."""
    text = log.read_bytes()
    return f"{log.stem}.{zlib.crc32(text):08x}{log.suffix}", text


def _log_of(name: str) -> str | None:
    """The log that a file of a copy is, in copies that were made without its CRC-32, too."""
    log = re.sub(r"\.[0-9a-f]{8}(?=\.)", "", name, count=1)
    return log if log in BESIDE else None


def _sum_of(text: bytes) -> Sum:
    return Sum(len(text), zlib.crc32(text))


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


def of_one_line(starts: Mapping[str, list[Start]]) -> list[str]:
    """The checkpoints on the way to the newest, oldest first, of {name: starts of the run by then}.

    A run that went on from step 10 has abandoned what it had made after it, until it makes it anew:
        starts at 0          step 5   10   15   20
        starts at 0, 10           10   15'         the newest is 15', and 20 is not on the way to it
    One list need not begin with another: a manifest may have been moved away or be an older one. A
    copy that tells no starts is taken for one of this way.
    """
    lists = {name: _in_order(found) for name, found in starts.items()}
    all_starts = {start for found in lists.values() for start in found}
    return sorted(
        name
        for name, own in lists.items()
        if all(step_of(name) <= start[-1] for start in all_starts if own and start > own[-1])
    )


def _in_order(starts: list[Start]) -> list[tuple[str, int, int]]:
    """Of one manifest, comparable with those of others, though a clock may have been put back."""
    times = accumulate((time for time, _ in starts), max)
    return [
        (time, place, step)
        for place, (time, (_, step)) in enumerate(zip(times, starts, strict=True))
    ]


def step_of(name: str) -> int:
    return int(name.removeprefix("step_"))


def _starts(url: str) -> list[Start]:
    """When and where a run began, up to the moment of a copy; [] where it does not tell."""
    try:
        (name,) = (name for name in _sums(url) or {} if _log_of(name) == MANIFEST)
        path = f"{url}/{name}"
        manifest = json.loads(STORE.read(path, start=0, stop=STORE.size(path)))
        return [(str(start["time"]), int(start["step"])) for start in manifest["starts"]]
    except (UserError, ValueError, LookupError, TypeError) as error:
        _raise_if_unknown(error)
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
            for name in sums:  # and nothing else: what is damaged here may serve somebody yet
                _part(checkpoint, name).unlink(missing_ok=True)
            with suppress(OSError):
                checkpoint.rmdir()
            return fault
        for name in sums:
            log = _log_of(name)
            if log and _is_behind(directory / log, _part(checkpoint, name)):
                _part(checkpoint, name).replace(directory / log)
        wanted = {_part(checkpoint, name): name for name in sums if not _log_of(name)}
        for path in checkpoint.iterdir():
            if path not in wanted and not path.is_dir():  # logs, and what was damaged here
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
    except (UserError, ValueError, AttributeError, TypeError) as error:
        _raise_if_unknown(error)
        return None
    # Names of files of one folder, and nothing that leads out of it.
    return sums if all(Path(name).name == name for name in sums) else None


def _raise_if_unknown(error: Exception) -> None:
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
