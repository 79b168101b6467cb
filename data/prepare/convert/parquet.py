"""Rows of parquet files, a few at a time."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as arrow
from pyarrow.parquet import ParquetFile

from data.prepare.convert.left_out import LeftOut
from data.prepare.convert.rows import Row
from data.prepare.convert.tasks import Piece
from nmm.errors import UserError

ROWS_AT_A_TIME = 16
BUFFER_BYTES = 1 << 20

Wanted = list[list[str]]  # of each list a file must have one column, and all that it has are read


def pieces(path: Path, *, wanted: Wanted, documents_per_task: int) -> Iterator[Piece]:
    """Runs of row groups that hold at most so many rows, if no group alone has more.

    Raises UserError for what is no parquet, or lacks the columns.
    """
    status = path.stat()
    rows, columns = _read_footer(path)
    for alternatives in wanted:
        if not set(alternatives) & set(columns):
            raise UserError(
                f"--input has {path} without a column {' or '.join(alternatives)}; it has "
                f"{', '.join(columns)}: name one of these, see --help of the form."
            )
    start = 0
    while start < len(rows):
        stop, documents = start + 1, rows[start]
        while stop < len(rows) and documents + rows[stop] <= documents_per_task:
            documents += rows[stop]
            stop += 1
        yield Piece(str(path), status.st_size, status.st_mtime_ns, documents, start, stop)
        start = stop


def _read_footer(path: Path) -> tuple[list[int], list[str]]:
    """Rows of every row group, and the names of the columns."""
    try:
        with ParquetFile(path) as file:
            found = file.metadata
            rows = [found.row_group(number).num_rows for number in range(found.num_row_groups)]
            return rows, file.schema_arrow.names
    except (arrow.ArrowException, OSError) as error:
        raise UserError(
            f"--input has {path}, which cannot be read as parquet ({error}); leave it out."
        ) from None


def read(piece: Piece, *, wanted: Wanted, left_out: LeftOut) -> Iterator[Row]:
    """A row with the wanted columns, as far as there are such, for every row of the row groups."""
    names = {name for alternatives in wanted for name in alternatives}
    # Buffered and not ahead of time, else a whole row group would be held in memory.
    with ParquetFile(piece.file, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        columns = [name for name in file.schema_arrow.names if name in names]
        sizes = [file.metadata.row_group(group).num_rows for group in range(piece.stop)]
        for group in range(piece.start, piece.stop):
            number = sum(sizes[:group])
            try:
                for values in _values(file, group, columns=columns):
                    where = f"{piece.path}:row {number}"
                    if values is None:
                        left_out.add("not UTF-8", where=where)
                    else:
                        yield Row(where, piece.file.parent, values)
                    number += 1
            except (arrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk, and not the file
                where = f"{piece.path}:row {number} ({error})"
                left_out.note("parquet that is damaged, to the end of the row group", where=where)


def _values(file: ParquetFile, group: int, *, columns: list[str]) -> Iterator[dict | None]:
    """Every row of a row group; None for one with a text that is none."""
    batches = file.iter_batches(
        batch_size=ROWS_AT_A_TIME, row_groups=[group], columns=columns, use_threads=False
    )
    for batch in batches:
        try:
            rows: list[dict | None] = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_one(batch.slice(row, 1)) for row in range(len(batch))]
        yield from rows


def _one(batch: arrow.RecordBatch) -> dict | None:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return None
