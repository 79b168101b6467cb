"""OUT/.convert: what of a conversion is done, so that one that was killed goes on where it was.

    OUT/.convert/command.json         the options of the command that began
    OUT/.convert/000003/task.json     what task 3 reads: another input is another task
    OUT/.convert/000003/*.tar         its shards
    OUT/.convert/000003/receipt.json  what is in them; written last
    OUT/.convert/moves.json           where all shards go; written when all tasks have receipts

At the end the shards get their final names in OUT and the folder goes away. The same command
repeats or continues each of these steps, wherever it was killed.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from data import atomic
from data.prepare.alone import alone
from data.prepare.convert import left_out
from data.prepare.convert.left_out import Found
from data.prepare.convert.options import Reading, Writing
from nmm.errors import UserError

FOLDER, FINISHED = ".convert", ".convert-finished"
FLAGS = {"form": "FORM", "text_from": "--text"}


@dataclass(frozen=True)
class Receipt:
    """What was written: documents and shards of each split, images, and what was left out.

    With `lists` of captions every caption is a document.
    """

    documents: dict[str, int]
    shards: dict[str, int]
    images: int
    lists: bool
    left_out: Found


class Workspace:
    """The folder of one conversion; made by `opened`."""

    def __init__(self, out: Path) -> None:
        self.out, self.root = out, out / FOLDER
        self._moves = self.root / "moves.json"

    def task(self, number: int) -> Path:
        return self.root / f"{number:06d}"

    def keep(self, number: int, task: str) -> Receipt | None:
        """The receipt of a task that is done; else its folder is made anew, with the task in it."""
        folder = self.task(number)
        file = folder / "task.json"
        if file.exists() and file.read_text() == task and (receipt := self.receipt(number)):
            return receipt
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _write(file, task)
        return None

    def drop_from(self, number: int) -> None:
        """Forget the tasks from this number on, which another input had."""
        for folder in self.root.iterdir():
            if folder.name.isdecimal() and int(folder.name) >= number:
                shutil.rmtree(folder)

    def receipt(self, number: int) -> Receipt | None:
        file = self.task(number) / "receipt.json"
        return Receipt(**json.loads(file.read_text())) if file.exists() else None

    def sign(self, number: int, receipt: Receipt) -> None:
        _write(self.task(number) / "receipt.json", json.dumps(asdict(receipt)))

    @property
    def is_complete(self) -> bool:
        """Is nothing left but to give the shards their names?"""
        return self._moves.exists()

    def complete(self, *, tasks: int) -> None:
        """All tasks are done: decide the final names of their shards, in the order of tasks.

        Raises UserError when there was no document at all.
        """
        total = join([self._signed(number) for number in range(tasks)])
        if not any(total.documents.values()):
            reasons = left_out.report(total.left_out)
            raise UserError(
                "--input holds no document that can be used"
                + (f"; what it holds was left out:\n{reasons.rstrip()}" if reasons else ".")
            )
        moves = []
        numbers: Counter[str] = Counter()
        for task in range(tasks):
            for split, shards in self._signed(task).shards.items():
                for shard in range(shards):
                    source = f"{FOLDER}/{task:06d}/{split}-{shard:06d}.tar"
                    moves.append((source, f"{split}-{numbers[split]:06d}.tar"))
                    numbers[split] += 1
        _write(self._moves, json.dumps({"total": asdict(total), "moves": moves}))

    def move(self) -> Receipt:
        """Give the shards their final names, and leave nothing else behind; what is in them."""
        record = json.loads(self._moves.read_text())
        for source, target in record["moves"]:
            here, there = self.out / source, self.out / target
            if here.exists() == there.exists():
                what = "is there twice" if here.exists() else "is gone"
                raise UserError(
                    f"{there} {what}; delete {self.root}, and what it wrote, and begin anew."
                )
            if here.exists():
                here.rename(there)
        self.root.rename(self.out / FINISHED)
        shutil.rmtree(self.out / FINISHED)
        return Receipt(**record["total"])

    def discard(self) -> None:
        """Take the folder away if no task has written a document: there is nothing to continue."""
        done = [
            Receipt(**json.loads(file.read_text())) for file in self.root.glob("*/receipt.json")
        ]
        if not any(join(done).documents.values()):
            shutil.rmtree(self.root)

    def _signed(self, number: int) -> Receipt:
        receipt = self.receipt(number)
        assert receipt is not None, number
        return receipt


def join(receipts: list[Receipt]) -> Receipt:
    """The sums over tasks; what was left out keeps the order of the tasks."""
    documents: Counter[str] = Counter()
    shards: Counter[str] = Counter()
    for receipt in receipts:
        documents.update(receipt.documents)
        shards.update(receipt.shards)
    found = left_out.join(receipt.left_out for receipt in receipts)
    return Receipt(
        documents=dict(documents),
        shards=dict(shards),
        images=sum(receipt.images for receipt in receipts),
        lists=any(receipt.lists for receipt in receipts),
        left_out=found,
    )


@contextmanager
def opened(reading: Reading, writing: Writing) -> Iterator[Workspace]:
    """The workspace of this command, which no other process has; it is there, or begins now.

    Raises UserError where another command has begun, or shards of these names exist.
    """
    writing.out.mkdir(parents=True, exist_ok=True)
    workspace = Workspace(writing.out)
    with alone(writing.out, doing="converts"):
        shutil.rmtree(writing.out / FINISHED, ignore_errors=True)
        _compare(workspace.root / "command.json", _command(reading, writing))
        if not workspace.is_complete:
            _refuse_existing(writing)
            workspace.root.mkdir(exist_ok=True)
            _write(workspace.root / "command.json", json.dumps(_command(reading, writing)))
        yield workspace


def _write(path: Path, text: str) -> None:
    with atomic.writing(path) as file:
        file.write(text.encode())


def _command(reading: Reading, writing: Writing) -> dict:
    """The options that the shards depend on, as JSON knows them."""
    found = {**vars(reading), **vars(writing)}
    del found["out"], found["lists"]
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _compare(file: Path, command: dict) -> None:
    if not file.exists():
        return
    begun = json.loads(file.read_text())
    for name, value in command.items():
        if begun.get(name) != value:
            flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise UserError(
                f"{file.parent} holds a conversion that was begun with {flag} {begun.get(name)}, "
                f"and now it is {value}; give the same command to continue it, choose another "
                f"--out, or delete that folder."
            )


def _refuse_existing(writing: Writing) -> None:
    existing = sorted(
        shard.name for split in writing.splits for shard in writing.out.glob(f"{split}-*.tar")
    )
    if existing:
        raise UserError(
            f"--out is {writing.out}, where {existing[0]} exists; choose another --out or --name, "
            f"or delete the shards."
        )
