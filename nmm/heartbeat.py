"""Where every process of a run is: a small file for each, which outlives it and says what it did.

heartbeats/rank_00003 has five lines at fixed places:
    who      host, process, rank
    place    step, phase, micro-batch, and how often the process has said so; twice
    batch    the documents of its micro-batches; twice
Of the two, the older is written over, and a line holds a checksum: whenever a process is killed,
the newer whole line is true. Writing a place is one call to the operating system and no wait for a
disk; what it may fail with is ignored, because a run does not end for it.
"""

import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"
PLACE_BYTES, BATCH_BYTES = 256, 32768  # of a line; the documents that do not fit are counted
PLACES_AT = PLACE_BYTES
BATCHES_AT = PLACES_AT + 2 * PLACE_BYTES
NAMED = 5


class Phase(Enum):
    """What a process does; a process in `data` waits for its batch and does not know it yet."""

    start = "start"
    data = "data wait"
    forward = "forward"
    backward = "backward"
    optimizer = "optimizer"
    between = "between steps"
    evaluation = "evaluation"
    checkpoint = "checkpoint"
    end = "end"


HAS_MICRO_BATCH = (Phase.forward, Phase.backward, Phase.evaluation)


@dataclass(frozen=True)
class Place:
    """Where a process was last; `documents` are those it worked on, as far as they are listed."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float  # seconds since 1970
    documents: list[str]
    num_documents: int

    def sentence(self) -> str:
        """E.g. "in step 8, forward, with 12 documents: caption-000001.tar/7, ..."."""
        where = f"in step {self.step}, {self.phase}"
        if not self.num_documents:
            return where
        named = ", ".join(self.documents[:NAMED])
        plural, more = "s" * (self.num_documents > 1), ", ..." * (self.num_documents > NAMED)
        return f"{where}, with {self.num_documents} document{plural}: {named}{more}"


class Heartbeat:
    """Writes the file of this process; `beats` grows with every phase that it enters."""

    def __init__(self, directory: Path, *, rank: int) -> None:
        self.step, self.beats, self._batches = 0, 0, 0
        self._phase, self._since = Phase.start, time.perf_counter()
        self._told: Callable[[Phase, int], None] | None = None
        self._seconds = dict.fromkeys(Phase, 0.0)
        folder = directory / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(file_of(directory, rank), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "rank": rank}
        self._write(json.dumps(who), at=0)
        self.enter(Phase.start)

    def enter(self, phase: Phase, micro_batch: int = 0, *, step: int | None = None) -> None:
        """From now on the process is in `phase` of `step`, that of before unless it is given."""
        self.step = self.step if step is None else step
        self.beats += 1
        if self._told is not None:
            self._told(phase, self.step)
        self._spend(phase)
        part = micro_batch if phase in HAS_MICRO_BATCH else "null"
        self._write(
            f'{{"beat": {self.beats}, "step": {self.step}, "phase": "{phase.value}", '
            f'"micro_batch": {part}, "time": {time.time():.3f}}}',
            at=PLACES_AT + self.beats % 2 * PLACE_BYTES,
        )

    def follow(self, told: Callable[[Phase, int], None]) -> None:
        """From now on tell of every phase before it begins, with its step."""
        self._told = told

    def seconds(self) -> dict[Phase, float]:
        """How long it was in each phase since this was last asked: together, all of the time."""
        self._spend(self._phase)
        spent, self._seconds = self._seconds, dict.fromkeys(Phase, 0.0)
        del spent[Phase.end]  # nobody asks any more
        return spent

    def hold(self, documents: Sequence[Sequence[str]]) -> None:
        """The documents of each micro-batch of `step`, before it enters a phase with them."""
        self._batches += 1
        batch = {
            "beat": self._batches,
            "step": self.step,
            "counts": [len(keys) for keys in documents],
            "documents": documents,
        }
        share = max(batch["counts"], default=0)
        while len(text := json.dumps(batch)) >= BATCH_BYTES - 16 and share:
            share //= 2
            batch["documents"] = [keys[:share] for keys in documents]
        self._write(text, at=BATCHES_AT + self._batches % 2 * BATCH_BYTES)

    def close(self) -> None:
        os.close(self._file)

    def _spend(self, phase: Phase) -> None:
        """The time until now was spent in the phase before, what follows in `phase`."""
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def _write(self, text: str, *, at: int) -> None:
        line = text.encode()
        with suppress(OSError):
            os.pwrite(self._file, b"%s %08x\n" % (line, zlib.crc32(line)), at)


def file_of(directory: Path, rank: int) -> Path:
    """The file of a process in a run directory."""
    return directory / FOLDER / f"rank_{rank:05d}"


def read(directory: Path, rank: int) -> Place | None:
    """Where a process of the run was last; None when it has not said so."""
    try:
        data = file_of(directory, rank).read_bytes()
    except OSError:
        return None
    who = _line(data, at=0, length=PLACE_BYTES)
    place = _newer(data, at=PLACES_AT, length=PLACE_BYTES)
    if who is None or place is None:
        return None
    batch = _newer(data, at=BATCHES_AT, length=BATCH_BYTES)
    documents, count = [], 0
    if batch is not None and batch["step"] == place["step"] and place["phase"] != Phase.data.value:
        one = place["micro_batch"]
        chosen = slice(None) if one is None else slice(one, one + 1)
        documents = [key for keys in batch["documents"][chosen] for key in keys]
        count = sum(batch["counts"][chosen])
    return Place(
        **who,
        step=place["step"],
        phase=place["phase"],
        since=place["time"],
        documents=documents,
        num_documents=count,
    )


def _newer(data: bytes, *, at: int, length: int) -> dict[str, Any] | None:
    lines = [_line(data, at=at + slot * length, length=length) for slot in (0, 1)]
    return max((line for line in lines if line), key=lambda line: line["beat"], default=None)


def _line(data: bytes, *, at: int, length: int) -> dict[str, Any] | None:
    """What follows the line is of a longer one before it."""
    text, _, checksum = data[at : at + length].partition(b"\n")[0].rpartition(b" ")
    return json.loads(text) if checksum == b"%08x" % zlib.crc32(text) and text else None
