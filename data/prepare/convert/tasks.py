"""The input cut into tasks: the unit of parallel work, and of what is not done again.

The cut depends on the files and on `--documents-per-task` alone, so that shards never depend on
the number of processes. Numbers of documents are estimates, from sizes, and need no pass over the
data.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Piece:
    """A part of one input file: all of it, or [start, stop) in bytes or row groups.

    size, modified  bytes and time (ns) of the file: another file under the name is another piece
    documents       about so many documents are in it
    """

    path: str
    size: int
    modified: int
    documents: int = 1
    start: int = 0
    stop: int = 0

    @property
    def file(self) -> Path:
        return Path(self.path)


Task = list[Piece]


def whole(path: Path, *, bytes_per_document: int | None = None) -> Piece:
    """All of a file; without a number it is one document."""
    status = path.stat() if path.exists() else path.lstat()  # a link to nothing is counted later
    documents = 1 if bytes_per_document is None else 1 + status.st_size // bytes_per_document
    return Piece(str(path), status.st_size, status.st_mtime_ns, documents)


def join(pieces: Iterable[Piece], *, documents_per_task: int) -> Iterator[Task]:
    """Consecutive pieces in tasks of at most so many documents, if no piece alone has more."""
    task: Task = []
    documents = 0
    for piece in pieces:
        if task and documents + piece.documents > documents_per_task:
            yield task
            task, documents = [], 0
        task.append(piece)
        documents += piece.documents
    if task:
        yield task


def dump(task: Task, *, lists: bool) -> str:
    """A task, and whether its captions are `lists`, as text: equal for equal input only."""
    return json.dumps({"lists": lists, "pieces": [asdict(piece) for piece in task]}, indent=0)


def load(text: str) -> tuple[Task, bool]:
    found = json.loads(text)
    return [Piece(**piece) for piece in found["pieces"]], found["lists"]
