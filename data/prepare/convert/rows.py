"""Rows of JSON lines and CSV: values by name, with the place that they come from."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.compression import DamagedError
from data.prepare.convert import streams, values
from data.prepare.convert.left_out import LeftOut, Unusable
from data.prepare.convert.tasks import Piece, whole

LOOK_AT_BYTES = 1 << 20
PACKED_BYTES_PER_LINE = 2000
BYTES_PER_CSV_ROW = 100


class Row(NamedTuple):
    """`where` names the row for the report; image paths are relative to `folder`."""

    where: str
    folder: Path
    values: dict


def line_pieces(path: Path, *, documents_per_task: int) -> Iterator[Piece]:
    """Byte ranges of about so many lines, as many as the first MiB lets expect.

    A compressed file is one piece, because it cannot be read from its middle.
    """
    if streams.packed_as(path) is not None:
        yield whole(path, bytes_per_document=PACKED_BYTES_PER_LINE)
        return
    status = path.stat()
    with path.open("rb") as file:
        start = file.read(LOOK_AT_BYTES)
    expected = status.st_size * (start.count(b"\n") + 1) // max(1, len(start))
    pieces = max(1, -(-expected // documents_per_task))
    for number in range(pieces):
        yield Piece(
            path=str(path),
            size=status.st_size,
            modified=status.st_mtime_ns,
            documents=expected // pieces,
            start=status.st_size * number // pieces,
            stop=status.st_size * (number + 1) // pieces,
        )


def read_lines(piece: Piece, *, left_out: LeftOut) -> Iterator[Row]:
    """A row for every line that holds a JSON object; blank lines do not count."""
    for where, line in _lines(piece, left_out=left_out):
        try:
            if line is None:
                raise Unusable(f"line of more than {values.MEBIBYTES} MiB")
            text = values.decode(line).strip()
            row = json.loads(text) if text else None
        except Unusable as reason:
            left_out.add(reason, where=where)
            continue
        except (ValueError, RecursionError):
            left_out.add("not JSON", where=where)
            continue
        if isinstance(row, dict):
            yield Row(where, piece.file.parent, row)
        elif text:
            left_out.add("not a JSON object", where=where)


def _lines(piece: Piece, *, left_out: LeftOut) -> Iterator[tuple[str, bytes | None]]:
    """The lines that begin in the piece; each by its number, or by its byte if that is unknown."""
    number = 0
    try:
        with streams.opened(piece.file) as file:
            if piece.start:
                file.seek(piece.start - 1)
                next(streams.lines(file), None)
            begin = file.tell() if piece.stop else 0
            for line in streams.lines(file):
                if piece.stop and begin >= piece.stop:
                    break
                number += 1
                yield f"{piece.path}:{f'byte {begin}' if piece.start else number}", line
                begin = file.tell() if piece.stop else 0
    except DamagedError as error:
        where = f"{piece.path}:{number + 1} ({error})"
        left_out.note("compressed file that is cut or damaged, from here on", where=where)


def read_csv(piece: Piece, *, left_out: LeftOut) -> Iterator[Row]:
    """A row for every record; the first line holds the names."""
    with piece.file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = csv.DictReader(file)
        try:
            for number, record in enumerate(records, start=2):
                yield Row(f"{piece.path}:{number}", piece.file.parent, record)
        except csv.Error as error:
            where = f"{piece.path}:{records.line_num} ({error})"
            left_out.note("CSV that is damaged, from here on", where=where)
