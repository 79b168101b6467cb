"""Running the converter in tests, and reading what it wrote."""

import json
import re
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from data import tar
from data.documents import parse, variants
from data.prepare.convert.__main__ import main
from data.prepare.index import index_shards
from nmm.config import Kind, Layout
from tests.corpora import tokenizer_path

Document = list[str | bytes]


def picture(colour: int, form: str = "JPEG") -> bytes:
    """A picture of one colour, another for every number below 64."""
    file = BytesIO()
    Image.new("RGB", (8, 8), (4 * colour, 0, 0)).save(file, form)
    return file.getvalue()


def write_lines(path: Path, rows: list) -> Path:
    """JSON lines; a row of bytes is written as it stands."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\r\n".join(lines))
    return path


def run(*arguments: object) -> None:
    main([str(argument) for argument in (*arguments, "--workers", 1)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says that is refused."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert isinstance(caught.value.code, str)
    return caught.value.code + capsys.readouterr().err


def check_reported(said: str, *expected: str) -> None:
    """Every line "COUNT REASON" is in the report, and no other reason is."""
    lines = {" ".join(line.split()) for line in said.splitlines() if line[7:8].isdecimal()}
    sums = re.compile(r"\d+ (images|documents in .*)")
    assert {line for line in lines if not sums.fullmatch(line)} == set(expected), said


def samples(directory: Path, name: str = "train") -> dict[str, dict[str, bytes]]:
    """Members by key, of all shards in their order."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in sorted(directory.glob(f"{name}-*.tar")):
        raw = shard.read_bytes()
        for sample in tar.scan(shard).samples:
            assert not sample.fault
            assert sample.key not in found
            found[sample.key] = tar.members_of(raw[sample.start : sample.stop])
    return found


def read(
    kind: Kind, directory: Path, name: str = "train", *, text_field: str | None = None
) -> list[Document]:
    """The documents of all shards, which the index must count as they are."""
    layout = Layout(kind, text_field)
    documents = [
        parse(layout, members, key=key, variant=variant).parts
        for key, members in samples(directory, name).items()
        for variant in range(variants(layout, members))
    ]
    shards = sorted(directory.glob(f"{name}-*.tar"))
    indexed = index_shards(shards, layout=layout, tokenizer=tokenizer_path())
    images = sum(isinstance(part, bytes) for document in documents for part in document)
    assert (indexed.documents, indexed.images) == (len(documents), images)
    assert (indexed.dropped, indexed.skipped_images) == ({}, 0)
    return documents
