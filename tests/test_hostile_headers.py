"""Headers that lie about themselves, of tars and of units: nothing hangs, nothing is a traceback.

What lies before such a header stays, it and what follows is named.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.indexing import index_shard
from data.prepare.validate import validate
from data.tokenizer import Tokenizer
from data.units import NotUnitsError, read_units
from nmm.config import Kind, Layout
from tests import corpora
from tests.test_units import npy

TEXTS = Layout(Kind.text)
SIZE, CHECKSUM, TYPE = slice(124, 136), slice(148, 156), 156


def member(name: str, **pax_headers: str) -> bytes:
    """A text of one block, behind a header of pax where there are fields for it."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = 512, pax_headers
    return info.tobuf(tarfile.PAX_FORMAT) + b"a red gate ".ljust(512)


def forged(*, size: bytes, kind: bytes = b"0") -> bytes:
    """The member with other bytes where its size and its type stand, and their checksum."""
    data = bytearray(member("b.txt"))
    data[SIZE], data[TYPE] = size, kind[0]
    data[CHECKSUM] = b" " * 8
    data[CHECKSUM] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


def base_256(number: int) -> bytes:
    return b"\x80" + number.to_bytes(11, "big")


LIES = {
    "negative in octal": forged(size=b"-1000\0\0\0\0\0\0\0"),
    "negative in base 256": forged(size=b"\xff" * 10 + b"\xfc\x00"),
    "negative in pax": member("b.txt", size="-1024"),
    "terabytes": forged(size=base_256(1 << 40)),
    "terabytes of a name": forged(size=base_256(1 << 40), kind=b"L"),
    "terabytes of pax": forged(size=base_256(1 << 40), kind=b"x"),
    "terabytes in a sparse file": forged(size=base_256(1 << 40), kind=b"S"),
    "beyond any offset": forged(size=base_256(1 << 87)),
    "beyond any offset in pax": member("b.txt", size="9" * 30),
    "a map of words": member("b.txt", **{"GNU.sparse.map": "abc"}),
    "a size of words": member("b.txt", **{"GNU.sparse.size": "abc"}),
    "a map that is not there": member(
        "b.txt", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    ),
    "names of names": forged(size=base_256(512), kind=b"L") * 2000,
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_ends_a_shard(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(member("a.txt") + LIES[name] + member("c.txt") + bytes(1024))
    found = index_shard(path, layout=TEXTS, tokenizer=Tokenizer(corpora.tokenizer_path()))
    assert found.key(0) == "a"
    assert "b" not in [found.key(number) for number in range(len(found))]
    assert found.dropped
    assert validate([path], layout=TEXTS).defects.total()
    path.write_bytes(LIES[name])
    assert validate([path], layout=TEXTS).defects.total()


def test_bytes_behind_the_end_of_a_size_are_no_digits(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(member("a.txt") + forged(size=b"0001000\0junk") + bytes(1024))
    found = index_shard(path, layout=TEXTS, tokenizer=Tokenizer(corpora.tokenizer_path()))
    assert [found.key(number) for number in range(len(found))] == ["a", "b"]


@pytest.mark.parametrize("header", ["{'descr': (), ", "{'descr': ('<i4',), ", "-" * 20_000])
def test_a_header_of_units_that_lies_is_none(header: str) -> None:
    good = npy(np.arange(3)).replace(b"{'descr': '<i8', ", header.encode())
    with pytest.raises(NotUnitsError):
        read_units(good[:8] + min(len(good) - 34, 9000).to_bytes(2, "little") + good[10:])
