"""A conversion: tasks, each written by one process, and then all shards under their names."""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from data.prepare.convert import forms, pool, tasks, workspace
from data.prepare.convert.captions import Captioned
from data.prepare.convert.forms import Document
from data.prepare.convert.left_out import LeftOut
from data.prepare.convert.options import HELD_OUT, Reading, Writing
from data.prepare.convert.pool import Tell
from data.prepare.convert.workspace import Receipt, Workspace
from data.shards import ShardWriter
from nmm.config import Kind


def convert(
    reading: Reading,
    writing: Writing,
    *,
    workers: int,
    progress: Callable[[int, int], Tell],
) -> Receipt:
    """Write OUT/NAME-*.tar and OUT/held_out-*.tar; what is in them.

    `progress` gets the number of tasks and of documents that are done already, and returns what to
    call with numbers of further documents. Raises UserError where shards of these names exist,
    where another command has begun, and when there is no document at all.
    """
    with workspace.opened(reading, writing) as space:
        if not space.is_complete:
            try:
                _do_tasks(space, reading, writing, workers=workers, progress=progress)
            except BaseException:
                space.discard()
                raise
        return space.move()


def _do_tasks(
    space: Workspace,
    reading: Reading,
    writing: Writing,
    *,
    workers: int,
    progress: Callable[[int, int], Tell],
) -> None:
    """Every task that has no receipt yet."""
    lists = _captions_are_lists(space, reading, writing)
    todo, done, number = [], 0, -1
    every = forms.tasks(reading, documents_per_task=writing.documents_per_task)
    for number, task in enumerate(every):
        receipt = space.keep(number, tasks.dump(task, lists=lists))
        if receipt is None:
            todo.append(number)
        else:
            done += sum(receipt.documents.values())
    space.drop_from(number + 1)
    work = partial(_do_task, space=space, reading=reading, writing=writing)
    pool.run(todo, work=work, processes=workers, tell=progress(number + 1, done))
    space.complete(tasks=number + 1)


def _captions_are_lists(space: Workspace, reading: Reading, writing: Writing) -> bool:
    """Has the first usable image a list of captions? Then all samples are written so."""
    if reading.form.kind is not Kind.caption:
        return False
    for task in forms.tasks(reading, documents_per_task=writing.documents_per_task):
        left_out = LeftOut()
        for piece in task:
            read = forms.read(piece, reading=reading, scratch=space.root, left_out=left_out)
            for document in read:
                return isinstance(document, Captioned) and document.is_list
    return False


def _do_task(
    number: int, tell: Tell, *, space: Workspace, reading: Reading, writing: Writing
) -> None:
    """Write the shards of a task into its folder, and its receipt when all are there."""
    folder = space.task(number)
    for shard in folder.glob("*.tar*"):
        shard.unlink()
    task, lists = tasks.load((folder / "task.json").read_text())
    reading, left_out = replace(reading, lists=lists), LeftOut()
    counts = dict.fromkeys(writing.splits, 0)
    samples = images = 0
    with ExitStack() as stack:
        size = writing.documents_per_shard
        writers = {
            split: stack.enter_context(ShardWriter(folder, name=split, documents_per_shard=size))
            for split in writing.splits
        }
        for piece in task:
            for document in forms.read(piece, reading=reading, scratch=folder, left_out=left_out):
                held_out = is_held_out(document, fraction=writing.held_out_fraction)
                split = HELD_OUT if held_out else writing.name
                _write(writers[split], f"{number:06d}-{samples:08d}", document, lists=lists)
                added = len(document.texts) if isinstance(document, Captioned) else 1
                counts[split] += added
                samples, images = samples + 1, images + _num_images(document)
                tell(added)
    shards = {split: len(writer.shards) for split, writer in writers.items()}
    space.sign(number, Receipt(counts, shards, images, lists, left_out.found))


def is_held_out(document: Document, *, fraction: float) -> bool:
    """Decided by a hash of the text, white space aside: equal texts are on the same side."""
    words = " ".join(" ".join(_texts(document)).split())
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _texts(document: Document) -> list[str]:
    match document:
        case Captioned(texts=texts):
            return texts
        case str():
            return [document]
        case _:
            return [part for part in document if isinstance(part, str)]


def _num_images(document: Document) -> int:
    match document:
        case Captioned():
            return 1
        case str():
            return 0
        case _:
            return sum(isinstance(part, bytes) for part in document)


def _write(writer: ShardWriter, key: str, document: Document, *, lists: bool) -> None:
    match document:
        case Captioned(image, texts) if lists:
            writer.captions(key, image=image, texts=texts)
        case Captioned(image, [text]):
            writer.caption(key, image=image, text=text)
        case str():
            writer.text(key, document)
        case list():
            writer.interleaved(key, document)
        case _:
            raise AssertionError(document)
