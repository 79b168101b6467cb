"""The forms: which files a form reads, how they are cut, and the documents of a piece."""

from collections.abc import Iterator
from enum import Enum, auto
from glob import glob
from pathlib import Path

from data.prepare.convert import captions, interleaved, pages, parquet, rows, tars, texts
from data.prepare.convert.captions import Captioned
from data.prepare.convert.left_out import LeftOut
from data.prepare.convert.options import Beside, Form, Reading
from data.prepare.convert.plain import Parts
from data.prepare.convert.rows import Row
from data.prepare.convert.tasks import Piece, Task, join, whole
from nmm.errors import UserError

Document = Captioned | Parts | str


class Container(Enum):
    """What a file is, whatever its documents are."""

    lines = auto()
    parquet = auto()
    csv = auto()
    tar = auto()
    file = auto()


SUFFIXES = {
    ".jsonl": Container.lines,
    ".ndjson": Container.lines,
    ".json": Container.lines,
    ".parquet": Container.parquet,
    ".csv": Container.csv,
    ".tar": Container.tar,
    ".tgz": Container.tar,
}
PACKED = (".gz", ".zst", ".zstd")
BESIDE_TARS = (".parquet", ".json")  # what img2dataset writes beside its tars


def tasks(reading: Reading, *, documents_per_task: int) -> Iterator[Task]:
    """All input in a fixed order; raises UserError for what cannot be read at all."""
    pieces = _pieces(reading, documents_per_task=documents_per_task)
    return join(pieces, documents_per_task=documents_per_task)


def read(piece: Piece, *, reading: Reading, scratch: Path, left_out: LeftOut) -> Iterator[Document]:
    """The documents of a piece; `scratch` is a folder for what must be unpacked."""
    match reading.form:
        case Form.captions_tar:
            return tars.read_captions(piece, reading=reading, scratch=scratch, left_out=left_out)
        case Form.captions_folder if reading.text_from is not Beside.metadata:
            return captions.from_folder(piece, reading=reading, left_out=left_out)
        case Form.markdown | Form.html:
            return pages.read(piece, reading=reading, left_out=left_out)
        case Form.text:
            return _texts(piece, reading=reading, scratch=scratch, left_out=left_out)
        case Form.interleaved_jsonl | Form.interleaved_parquet:
            found = _rows(piece, reading=reading, left_out=left_out)
            return interleaved.from_rows(found, reading=reading, left_out=left_out)
        case _:
            found = _rows(piece, reading=reading, left_out=left_out)
            return captions.from_rows(found, reading=reading, left_out=left_out)


def _texts(piece: Piece, *, reading: Reading, scratch: Path, left_out: LeftOut) -> Iterator[str]:
    match _container(piece.file, form=reading.form):
        case Container.tar:
            return tars.read_texts(piece, reading=reading, scratch=scratch, left_out=left_out)
        case Container.file:
            return texts.from_file(piece, reading=reading, left_out=left_out)
        case _:
            found = _rows(piece, reading=reading, left_out=left_out)
            return texts.from_rows(found, reading=reading, left_out=left_out)


def _rows(piece: Piece, *, reading: Reading, left_out: LeftOut) -> Iterator[Row]:
    match _container(piece.file, form=reading.form):
        case Container.parquet:
            return parquet.read(piece, wanted=_columns(reading), left_out=left_out)
        case Container.csv:
            return rows.read_csv(piece, left_out=left_out)
        case _:
            return rows.read_lines(piece, left_out=left_out)


def _columns(reading: Reading) -> parquet.Wanted:
    """The fields of a row that the form looks at."""
    texts = [field for field in (reading.text_field, reading.fallback_field) if field is not None]
    match reading.form:
        case Form.interleaved_jsonl | Form.interleaved_parquet:
            return interleaved.COLUMNS
        case Form.text:
            return [texts]
        case _:
            return [[reading.image_field], texts]


def _container(path: Path, *, form: Form) -> Container:
    """By the form where it says so, else by the name of the file."""
    match form:
        case Form.captions_tar:
            return Container.tar
        case Form.captions_parquet | Form.interleaved_parquet:
            return Container.parquet
        case Form.captions_jsonl | Form.interleaved_jsonl:
            return Container.lines
        case Form.markdown | Form.html:
            return Container.file
        case _:
            name = path.name.lower()
            for ending in PACKED:
                name = name.removesuffix(ending)
            return SUFFIXES.get(Path(name).suffix, Container.file)


def _pieces(reading: Reading, *, documents_per_task: int) -> Iterator[Piece]:
    if reading.form is Form.captions_folder:
        paths = captions.walk(reading)
    else:
        paths = iter(_paths(reading))
    for path in paths:
        match _container(path, form=reading.form):
            case Container.parquet:
                yield from parquet.pieces(
                    path, wanted=_columns(reading), documents_per_task=documents_per_task
                )
            case Container.lines:
                yield from rows.line_pieces(path, documents_per_task=documents_per_task)
            case Container.csv:
                yield whole(path, bytes_per_document=rows.BYTES_PER_CSV_ROW)
            case Container.tar:
                yield whole(path, bytes_per_document=tars.BYTES_PER_SAMPLE)
            case Container.file:
                yield whole(path, bytes_per_document=reading.document_characters)


def _paths(reading: Reading) -> list[Path]:
    """Files in the order given; those of a glob are sorted."""
    found: dict[Path, None] = {}
    for pattern in reading.input:
        names = [pattern] if Path(pattern).exists() else sorted(glob(pattern, recursive=True))
        files = [Path(name) for name in names if Path(name).is_file()]
        if reading.form is Form.captions_tar:
            files = [file for file in files if file.suffix not in BESIDE_TARS]
        if not files:
            folder = pattern.rstrip("/") if Path(pattern).is_dir() else "DIR"
            raise UserError(
                f"--input is {pattern}, which names no file for {reading.form.value}; give files, "
                f"or a quoted glob such as '{folder}/**/*'."
            )
        found |= dict.fromkeys(files)
    return list(found)
