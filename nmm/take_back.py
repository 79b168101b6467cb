"""Copies of checkpoints, found in an object store and taken back to a disk that has none.

nmm/copies.py puts them there, and says what lies in a copy.
"""

import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

from data.retry import NotAllowedError, NotThereError, cause_of
from data.store import name_of
from nmm.copies import COPIED, STORE, THREADS, listed, log_of, raise_if_unknown, sums_of
from nmm.errors import UserError
from nmm.rundir import MANIFEST
from nmm.sums import MARKER, Sum, fault_of

Start = tuple[str, int]  # of a run: when, and at which step


def names(url: str) -> list[str]:
    """The checkpoints of a run that the store has, oldest first; raises UserError."""
    found = sorted(name for name in listed(url) if re.fullmatch(r"step_\d{8}", name))
    with ThreadPoolExecutor(THREADS) as pool:
        whole = pool.map(lambda name: COPIED in listed(f"{url}/{name}"), found)
        return [name for name, is_whole in zip(found, whole, strict=True) if is_whole]


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
        (name,) = (name for name in sums_of(url) or {} if log_of(name) == MANIFEST)
        path = f"{url}/{name}"
        manifest = json.loads(STORE.read(path, start=0, stop=STORE.size(path)))
        return [(str(start["time"]), int(start["step"])) for start in manifest["starts"]]
    except (UserError, ValueError, LookupError, TypeError) as error:
        raise_if_unknown(error)
        return []


def newest(url: str, directory: Path) -> tuple[str | None, list[str]]:
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
    sums = sums_of(url)
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
            log = log_of(name)
            if log and _is_behind(directory / log, _part(checkpoint, name)):
                _part(checkpoint, name).replace(directory / log)
        wanted = {_part(checkpoint, name): name for name in sums if not log_of(name)}
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
