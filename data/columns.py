"""A file of named arrays that opens without reading them: one line of JSON, then the bytes.

    {"documents": 2, ..., "columns": {"crc": ["<u4", 0, 2], ...}, "bytes": 72, "crc": 123}\\n
    crc....................start...

The JSON is padded with spaces so that the arrays begin at a multiple of ALIGN bytes, as does each
of them; a column is [type, offset from there, items]. `bytes` and `crc` are those of all behind
the line.
"""

import json
import mmap
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import atomic

ALIGN = 64
MAX_HEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class Head:
    """The first line of a file; its arrays begin at byte `start`."""

    values: dict
    start: int


def write(path: Path, *, values: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write the file; it appears complete or not at all."""
    columns: dict[str, tuple[str, int, int]] = {}
    body = bytearray()
    for name, array in arrays.items():
        body += bytes(-len(body) % ALIGN)
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        columns[name] = (little.dtype.str, len(body), len(array))
        body += little.tobytes()
    head = {**values, "columns": columns, "bytes": len(body), "crc": zlib.crc32(body)}
    line = json.dumps(head).encode()
    with atomic.writing(path) as file:
        file.write(line + b" " * (-(len(line) + 1) % ALIGN) + b"\n")
        file.write(body)


def read_head(path: Path) -> Head:
    """The values of a file; raises ValueError when it is not one, or not whole, and OSError."""
    with path.open("rb") as file:
        line = file.readline(MAX_HEAD_BYTES)
        size = os.fstat(file.fileno()).st_size
    values = json.loads(line)
    behind = values.get("bytes") if isinstance(values, dict) else None
    if not isinstance(behind, int) or len(line) + behind != size:
        raise ValueError(f"{path} is not whole")
    return Head(values, len(line))


def read(path: Path, *, names: Iterable[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """The values and the arrays, mapped into memory and read-only; ValueError for damage.

    No checksum covers the first line, so it must name these arrays, and types that there are.
    """
    head = read_head(path)
    try:
        described = dict(head.values["columns"])
        types = {name: np.dtype(kind) for name, (kind, _, _) in described.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a damaged first line") from error
    if set(types) != set(names) or any(types[n].str != described[n][0] for n in types):
        raise ValueError(f"{path} holds other arrays")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if zlib.crc32(memoryview(mapped)[head.start :]) != head.values.get("crc"):
        raise ValueError(f"{path} holds other bytes than were written")
    arrays = {
        name: np.frombuffer(mapped, types[name], count=items, offset=head.start + offset)
        for name, (_, offset, items) in described.items()
    }
    return head.values, arrays
