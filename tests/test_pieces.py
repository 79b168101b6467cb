"""Numbers by name and range: found whoever wrote them, and missed when they are not there."""

import json
from pathlib import Path

import pytest
import torch

from nmm.pieces import PIECES, WEIGHT, Piece, Share, Stored, Written, write_pieces, write_shares

WHOLE = torch.arange(10.0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A parameter of ten numbers, of which one process wrote six and another four."""
    pieces = [[[Piece("up", 0, 3, 6)]], [[], [Piece("up", 6, 0, 4)]]]
    tensors = [[torch.zeros(12)], [torch.zeros(2), torch.zeros(8)]]
    for process, (shares, flats) in enumerate(zip(pieces, tensors, strict=True)):
        for piece, flat in ((p, f) for ps, f in zip(shares, flats, strict=True) for p in ps):
            into = flat.narrow(0, piece.offset, piece.numel)
            into.copy_(WHOLE.narrow(0, piece.start, piece.numel))
        written = [Share({WEIGHT: f}, p) for p, f in zip(shares, flats, strict=True)]
        write_shares(tmp_path, written, process=process)
    write_pieces(tmp_path, Written(7, 6, [], 2, 1, {"up": [2, 5]}, pieces))
    return tmp_path


def test_any_range_is_found(checkpoint: Path) -> None:
    stored = Stored(checkpoint)
    for start in range(10):
        for stop in range(start + 1, 11):
            found = torch.empty(stop - start)
            stored.copy(found, name="up", kind=WEIGHT, start=start)
            assert torch.equal(found, WHOLE[start:stop]), (start, stop)
    assert torch.equal(dict(stored.weights())["up"], WHOLE.view(2, 5))
    assert (stored.about.step, stored.about.updates) == (7, 6)


def test_nothing_is_read_of_files_that_are_not_needed(checkpoint: Path) -> None:
    (checkpoint / "states_00001.pt").unlink()
    found = torch.empty(6)
    Stored(checkpoint).copy(found, name="up", kind=WEIGHT)
    assert torch.equal(found, WHOLE[:6])
    with pytest.raises(FileNotFoundError):
        Stored(checkpoint).copy(found, name="up", kind=WEIGHT, start=4)


def test_numbers_that_nobody_wrote_are_missed(checkpoint: Path) -> None:
    found = torch.empty(10)
    with pytest.raises(KeyError, match="down"):
        Stored(checkpoint).copy(found, name="down", kind=WEIGHT)
    with pytest.raises(KeyError, match="exp_avg"):
        Stored(checkpoint).copy(found, name="up", kind="exp_avg")
    with pytest.raises(ValueError, match="2 of 4 elements of up"):
        Stored(checkpoint).copy(found[:4], name="up", kind=WEIGHT, start=8)
    about = json.loads((checkpoint / PIECES).read_text())
    about["files"][1] = []
    (checkpoint / PIECES).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="6 of 10 elements of up, weight are there"):
        Stored(checkpoint).copy(found, name="up", kind=WEIGHT)


def test_nothing_but_the_numbers_of_a_view_is_written(tmp_path: Path) -> None:
    big = torch.zeros(1_000_000)
    write_shares(tmp_path, [Share({WEIGHT: big[5:8]}, [Piece("up", 0, 0, 3)])], process=0)
    assert (tmp_path / "states_00000.pt").stat().st_size < 10_000
