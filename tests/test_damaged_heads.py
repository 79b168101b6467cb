"""The first line of an index and of a folder's totals has no checksum, so every field is compared.

Whatever changes in it, the run is refused in one sentence, or is what it would have been.
"""

import json
import shutil
from pathlib import Path

import pytest

from nmm.config import Kind
from nmm.errors import UserError
from tests import corpora

INDEX, TOTALS = "train-000001.tar.index", "index.totals"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(corpora.corpus_directory(), tmp_path / "copy")
    return tmp_path / "copy" / "caption"


def opened(folder: Path) -> tuple[str, int]:
    """The corpus and, of each of its shards, the index."""
    whole = corpora.config(folder.parent)
    config = corpora.config(sources={"caption": whole.sources[Kind.caption.value]})
    corpus = corpora.open_corpus(config)
    return corpus.fingerprint, sum(len(shard.index) for shard in corpus.sources[0].shards)


def rewrite(path: Path, old: str, new: str) -> None:
    """Another first line of the same length."""
    line, _, rest = path.read_bytes().partition(b"\n")
    assert line.count(old.encode()) >= 1, old
    changed = line.rstrip().replace(old.encode(), new.encode(), 1)
    path.write_bytes(changed.ljust(len(line)) + b"\n" + rest)


def fields(path: Path) -> list[str]:
    head = json.loads(path.read_bytes().partition(b"\n")[0])
    values = [name for name, value in head.items() if value is not None]  # null is as good as none
    return [*values, *head["columns"]]


@pytest.mark.parametrize("name", [INDEX, TOTALS])
def test_a_field_of_another_name(name: str, folder: Path) -> None:
    expected, kept = opened(folder), (folder / name).read_bytes()
    (folder / TOTALS).unlink() if name == INDEX else None
    for field in fields(folder / name):
        rewrite(folder / name, f'"{field}":', f'"{field[:-1]}!":')
        if name == TOTALS:  # a damaged one costs time and nothing else
            assert opened(folder) == expected, field
        else:
            with pytest.raises(UserError, match=r"is (damaged|stale)") as caught:
                opened(folder)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"documents": 25', '"documents": 24'),
        ('"documents": 25', '"documents": "5"'),
        ('"images": 25', '"images": 52'),
        ('"text_tokens": ', '"text_tokens": 1'),
        ('"skipped_images": 0', '"skipped_images": 1'),
        ('"longest": [[', '"longest": [{}, ['),
        ('"digest": "', '"digest": "x'),
        ('"start": ["<i8", 0', '"start": ["<i8", 8'),
        ('"start": ["<i8", 0', '"start": ["<i8", -8'),
        ('"stop": ["<i8"', '"stop": ["<q9"'),
        ('"variant": ["<i4"', '"variant": ["2i2"'),
    ],
)
def test_another_value(old: str, new: str, folder: Path) -> None:
    (folder / TOTALS).unlink()
    rewrite(folder / INDEX, old, new)
    with pytest.raises(UserError, match=rf"{INDEX} is damaged; run `python -m data.prepare.index"):
        opened(folder)
