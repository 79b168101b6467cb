"""Documents of text: files, rows and members of tars, whole or in pieces."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from data.compression import DamagedError
from data.prepare.convert import streams, values
from data.prepare.convert.left_out import LeftOut, Unusable
from data.prepare.convert.options import Reading
from data.prepare.convert.rows import Row
from data.prepare.convert.tasks import Piece

ZIP = b"PK\x03\x04"


def from_rows(rows: Iterable[Row], *, reading: Reading, left_out: LeftOut) -> Iterator[str]:
    """The text of every row."""
    field, characters = reading.text_field or "text", reading.document_characters
    for row in rows:
        try:
            text = values.text(row.values.get(field), field=field)
            if not text.strip():
                raise Unusable(f"no text in {field}")
        except Unusable as reason:
            left_out.add(reason, where=row.where)
            continue
        left_out.used()
        yield from split(text, characters=characters)


def from_file(piece: Piece, *, reading: Reading, left_out: LeftOut) -> Iterator[str]:
    """A file as one document, or as many; one that is not wholly text gives none."""
    characters = reading.document_characters
    try:
        _refuse_archive(piece.file)
        if characters is None:
            yield from _whole(piece.file)
        else:
            for _ in _lines(piece.file):  # to be sure of its end before its begin is written
                pass
            yield from split_lines(_lines(piece.file), characters=characters)
    except Unusable as reason:
        left_out.add(reason, where=piece.path)
    except DamagedError as error:
        left_out.add("compressed file that is cut or damaged", where=f"{piece.path} ({error})")
    else:
        left_out.used()


def split(text: str, *, characters: int | None) -> Iterator[str]:
    if characters is None:
        yield text.strip("\n")
    else:
        yield from split_lines(text.split("\n"), characters=characters)


def split_lines(lines: Iterable[str], *, characters: int) -> Iterator[str]:
    """Pieces that end at a blank line after `characters`, or at a line end after twice that."""
    piece: list[str] = []
    length = 0
    for line in lines:
        piece.append(line)
        length += len(line) + 1
        if length >= (2 if line.strip() else 1) * characters:
            yield from _joined(piece)
            piece, length = [], 0
    yield from _joined(piece)


def _joined(lines: list[str]) -> Iterator[str]:
    piece = "\n".join(lines).strip("\n")
    if piece.strip():
        yield piece


def _refuse_archive(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(ZIP)) == ZIP:
            raise Unusable("ZIP archive, to be unpacked first")


def _whole(path: Path) -> Iterator[str]:
    with streams.opened(path) as file:
        data = file.read(values.MAX_BYTES + 1)
    if len(data) > values.MAX_BYTES:
        raise Unusable(f"file of more than {values.MEBIBYTES} MiB; set --document-characters")
    text = values.decode(data).strip("\n")
    if not text.strip():
        raise Unusable("no text in the file")
    yield text


def _lines(path: Path) -> Iterator[str]:
    """Every line without its end; raises Unusable where the file is no text."""
    blank = True
    with streams.opened(path) as file:
        for line in streams.lines(file):
            if line is None:
                raise Unusable(f"line of more than {values.MEBIBYTES} MiB")
            text = values.decode(line).removesuffix("\n")
            blank = blank and not text.strip()
            yield from text.split("\n")
    if blank:
        raise Unusable("no text in the file")
