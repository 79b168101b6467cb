"""The validator reads what lies beside a shard as well: its index and its stored token ids."""

from pathlib import Path

import pytest

from data.prepare.index import index_shards
from data.prepare.validate import validate
from nmm.config import Kind, Layout
from tests import corpora

LAYOUT = Layout(Kind.text)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    corpora.write_shards(tmp_path, kind=Kind.text, name="x", documents=20, per_shard=20, seed=0)
    (path,) = tmp_path.glob("*.tar")
    index_shards([path], layout=LAYOUT, tokenizer=corpora.tokenizer_path(), store_tokens=True)
    return path


def found(shard: Path) -> list[tuple[str, str]]:
    return [(each.reason, each.key) for each in validate([shard], layout=LAYOUT).findings]


def test_token_ids_are_compared_document_by_document(shard: Path) -> None:
    assert found(shard) == []
    tokens = Path(f"{shard}.tokens")
    whole = tokens.read_bytes()
    tokens.write_bytes(bytes([whole[0] ^ 1]) + whole[1:-1] + bytes([whole[-1] ^ 1]))
    assert found(shard) == [("bad_tokens", "000000"), ("bad_tokens", "000019")]
    tokens.write_bytes(whole[:-1])
    assert found(shard) == [("bad_tokens", "000019"), ("bad_tokens", "")]
    tokens.write_bytes(whole + b"\0")
    assert found(shard) == [("bad_tokens", "")]
    tokens.unlink()
    assert found(shard) == [("bad_tokens", "")]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"digest": "', b'"digest": ["'),
        (b'"documents": 20', b'"documents": 21'),
        (b'"token_bytes": ', b'"token_bytes": 1'),
    ],
)
def test_a_damaged_index_is_a_defect(old: bytes, new: bytes, shard: Path) -> None:
    index = Path(f"{shard}.index")
    line, _, rest = index.read_bytes().partition(b"\n")
    assert old in line
    index.write_bytes(line.rstrip().replace(old, new).ljust(len(line)) + b"\n" + rest)
    assert found(shard) == [("bad_index", "")]
    index.write_bytes(line + b"\n" + rest[:-1] + bytes([rest[-1] ^ 1]))
    assert found(shard) == [("bad_index", "")]
    index.unlink()
    assert found(shard) == []
