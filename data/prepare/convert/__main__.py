"""Turn data made by others into our shards, in parallel; a killed command goes on where it was.

python -m data.prepare.convert FORM --help
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from data.prepare.convert import command, left_out
from data.prepare.convert.options import Writing
from data.prepare.convert.pool import Tell
from data.prepare.convert.run import convert
from data.prepare.convert.workspace import Receipt
from data.shards import CAPTION_FIELD
from nmm.errors import UserError

INTERRUPTED = 130  # the exit code of a shell for SIGINT


def main(arguments: list[str] | None = None) -> None:
    try:
        reading, writing, workers = command.parse(arguments)
        with (
            tqdm(unit=" documents", disable=None, leave=False) as bar,
            _terminated_like_interrupted(),
        ):

            def progress(tasks: int, done: int) -> Tell:
                bar.initial = bar.n = done
                bar.set_postfix_str(f"{tasks} tasks")
                return bar.update

            receipt = convert(reading, writing, workers=workers, progress=progress)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command continues from the tasks that are done.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(left_out.report(receipt.left_out), end="")
    print(_summary(receipt, writing), end="")


def _summary(receipt: Receipt, writing: Writing) -> str:
    """What there is now, where, and what the next commands must be told."""
    lines = []
    for split in writing.splits:
        count = receipt.documents.get(split, 0)
        lines.append(f"{count:8}  documents in {writing.out}/{split}-*.tar")
        if not count:
            lines.append(f"  none fell into {split}; change --held-out-fraction if you need some.")
    if receipt.images:
        lines.append(f"{receipt.images:8}  images")
    if receipt.lists:
        lines.append(
            f"Images have several captions: index and train with the text field {CAPTION_FIELD}."
        )
    return "\n".join([*lines, ""])


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Schedulers send SIGTERM before they kill: it ends the command as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
