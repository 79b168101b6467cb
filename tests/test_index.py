"""An index counts what its shard holds; damage is counted; a stale index is refused."""

import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from data import index, tar
from data.container import document_bytes
from data.corpus import find_shards
from data.documents import parse
from data.index import load, read_totals
from data.indexing import index_shard
from data.prepare import index as command
from data.prepare.index import index_shards
from data.store import LOCAL, Store
from data.tokenizer import Tokenizer
from nmm.config import Kind, Layout
from nmm.errors import UserError
from tests import corpora
from tests.corpora import write_tar

RNG = np.random.default_rng(0)
PICTURE = corpora.jpeg(RNG)
TEXT = b"a red circle."


def pair(key: str, *, image: bytes = PICTURE, text: bytes = TEXT) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image), (f"{key}.txt", text)]


def keys(shard: index.ShardIndex) -> list[str]:
    return [shard.key(i) for i in range(len(shard))]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(corpora.tokenizer_path())


@pytest.mark.parametrize("kind", corpora.KINDS)
def test_counts_are_those_of_the_text_itself(kind: Kind, tokenizer: Tokenizer) -> None:
    for path in corpora.corpus_directory().glob(f"{kind.value}/*.tar"):
        stored = load(path, layout=Layout(kind), tokenizer=tokenizer)
        texts = images = 0
        for i in range(len(stored)):
            members = document_bytes(
                path, start=int(stored.start[i]), stop=int(stored.stop[i]), crc=int(stored.crc[i])
            )
            parts = parse(Layout(kind), members).parts
            mine = [len(tokenizer.encode(part)) for part in parts if isinstance(part, str)]
            texts, images = texts + sum(mine), images + len(parts) - len(mine)
            assert stored.lengths(16)[i] == 2 + sum(mine) + 16 * (len(parts) - len(mine))
        assert (stored.text_tokens, stored.images) == (texts, images)
        assert stored.dropped == []


def test_members_by_hand_are_those_of_tarfile(tmp_path: Path) -> None:
    names = [
        "a.jpg",
        "dir.d/b.0.JPG",
        "dir.d/b.json",
        "ü" * 80 + ".txt",
        "deep/" * 30 + "c.txt",
        "._c.jpg",
    ]
    members = [(name, os.urandom(n * 311)) for n, name in enumerate(names)]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        usable = [m for m in members if form != tarfile.USTAR_FORMAT or len(m[0].encode()) < 100]
        raw = write_tar(tmp_path / "t.tar", usable, form=form).read_bytes()
        expected = {tar.split_name(name)[1]: data for name, data in usable if name != "._c.jpg"}
        assert tar._members_by_tarfile(raw) == expected
        for sample in tar.scan(tmp_path / "t.tar").samples:
            found = tar.members_of(raw[sample.start : sample.stop])
            mine = [(name, data) for name, data in usable if tar.split_name(name)[0] == sample.key]
            assert found == {tar.split_name(name)[1]: data for name, data in mine}


GOOD = pair("good")
DAMAGED = {
    "missing_text": [("a.jpg", PICTURE)],
    "missing_image": [("a.txt", TEXT)],
    "several_images": [("a.jpg", PICTURE), ("a.png", PICTURE), ("a.txt", TEXT)],
    "duplicate_member": [("a.jpg", PICTURE), ("a.jpg", PICTURE), ("a.txt", TEXT)],
    "not_adjacent": [("a.jpg", PICTURE), *pair("b"), ("a.txt", TEXT)],
    "empty_text": pair("a", text=b" \r\n"),
    "not_utf8": pair("a", text="über".encode("latin-1")),
    "nul_in_text": pair("a", text=b"a\0b"),
    "image_header": pair("a", image=b"<html>no image</html>"),
}


@pytest.mark.parametrize("reason", DAMAGED)
def test_a_bad_sample_is_dropped_and_counted(
    reason: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_tar(tmp_path / "x.tar", [*DAMAGED[reason], *GOOD])
    found = index_shard(path, layout=Layout(Kind.caption), tokenizer=tokenizer)
    assert found.dropped == [(reason, "a")]
    assert keys(found) == (["b", "good"] if reason == "not_adjacent" else ["good"])


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (b"{", "bad_json"),
        (b"[]", "bad_layout"),
        (json.dumps({"texts": ["x"], "images": []}).encode(), "bad_layout"),
        (json.dumps({"texts": ["x"], "images": ["0.jpg"]}).encode(), "bad_layout"),
        (json.dumps({"texts": ["x", None], "images": [None, 7]}).encode(), "bad_layout"),
        (json.dumps({"texts": [None], "images": ["0.jpg"]}).encode(), "empty_text"),
        (b'{"texts": ["\\ud800"], "images": [null]}', "not_utf8"),
    ],
)
def test_a_bad_story_is_dropped_and_counted(
    layout: bytes, reason: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    good = json.dumps({"texts": ["x", None], "images": [None, "0.jpg"]}).encode()
    members = [("a.json", layout), ("a.0.jpg", PICTURE), ("b.json", good), ("b.0.jpg", PICTURE)]
    found = index_shard(
        write_tar(tmp_path / "x.tar", members), layout=Layout(Kind.interleaved), tokenizer=tokenizer
    )
    assert (found.dropped, keys(found)) == ([(reason, "a")], ["b"])


def test_what_is_unusual_but_good_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    members = [
        ("dir.d/a.JPEG", PICTURE),
        ("dir.d/._a.JPEG", b"AppleDouble"),
        ("dir.d/a.txt", b"\xef\xbb\xbfa red circle."),
        *pair("new\nline"),
        *pair("ü" * 90),
    ]
    found = index_shard(
        write_tar(tmp_path / "x.tar", members, form=tarfile.PAX_FORMAT),
        layout=Layout(Kind.caption),
        tokenizer=tokenizer,
    )
    assert keys(found) == ["dir.d/a", "new\nline", "ü" * 90]
    assert len(set(found.lengths(4).tolist())) == 1
    assert found.dropped == []


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_truncated_shard_keeps_its_complete_samples(
    cut: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    members = [member for n in range(4) for member in pair(f"{n}")]
    whole = write_tar(tmp_path / "x.tar", members)
    ends = [sample.stop for sample in tar.scan(whole).samples]
    data = whole.read_bytes()[: ends[-1] * cut // 12]
    whole.write_bytes(data)
    complete = [f"{n}" for n, end in enumerate(ends) if end <= len(data)]
    if not complete:
        with pytest.raises(UserError, match="holds no document"):
            index_shard(whole, layout=Layout(Kind.caption), tokenizer=tokenizer)
        return
    found = index_shard(whole, layout=Layout(Kind.caption), tokenizer=tokenizer)
    assert keys(found) == complete
    assert len(found.dropped) >= (len(data) > ends[len(complete) - 1])


def test_garbage_behind_good_samples_is_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_tar(tmp_path / "x.tar", GOOD)
    path.write_bytes(path.read_bytes()[: tar.scan(path).samples[0].stop] + b"garbage" * 1000)
    found = index_shard(path, layout=Layout(Kind.caption), tokenizer=tokenizer)
    assert [reason for reason, _ in found.dropped] == ["unreadable_tail"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b\x08\x00" + bytes(600), "is gzip data"),
        (b"<!DOCTYPE html>" * 90, "is not a tar"),
        (bytes(10240), "holds no document of kind caption: it has no files"),
    ],
)
def test_a_shard_without_samples_is_refused(
    data: bytes, sentence: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        index_shard(path, layout=Layout(Kind.caption), tokenizer=tokenizer)


def test_other_extensions_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.input.jpg", PICTURE), ("a.cls", b"3")])
    with pytest.raises(UserError, match=r"it has \.input\.jpg, \.cls \(1 missing_image\)"):
        index_shard(path, layout=Layout(Kind.caption), tokenizer=tokenizer)


def test_a_stale_index_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_tar(tmp_path / "x.tar", [*pair("a"), *pair("b")])
    with pytest.raises(
        UserError, match=r"x\.tar has no index; run `python -m data\.prepare\.index --kind caption"
    ):
        load(path, layout=Layout(Kind.caption), tokenizer=tokenizer)
    made = index_shard(path, layout=Layout(Kind.caption), tokenizer=tokenizer)
    made.save(path)
    assert load(path, layout=Layout(Kind.caption), tokenizer=tokenizer).digest == made.digest
    with pytest.raises(UserError, match="its kind is caption, now it is text"):
        load(path, layout=Layout(Kind.text), tokenizer=tokenizer)
    stored = path.with_name("x.tar.index")
    whole = stored.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        stored.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is damaged; run"):
            load(path, layout=Layout(Kind.caption), tokenizer=tokenizer)
    for place in (20, len(whole) // 2, len(whole) - 1):
        stored.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"(is damaged|is stale).*; run"):
            load(path, layout=Layout(Kind.caption), tokenizer=tokenizer)
    stored.write_bytes(whole)
    other = corpora.train_tokenizer(tmp_path / "other.model", vocab_size=320)
    with pytest.raises(UserError, match="its tokenizer is"):
        load(path, layout=Layout(Kind.caption), tokenizer=Tokenizer(other))
    with path.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match="its shard size in bytes is"):
        load(path, layout=Layout(Kind.caption), tokenizer=tokenizer)


def test_an_index_says_its_totals_in_its_first_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Sums and the longest document are those of the arrays, for any tokens of an image."""
    corpora.write_shards(
        tmp_path, kind=Kind.interleaved, name="x", documents=40, per_shard=40, seed=0
    )
    shard = tmp_path / "x-000000.tar"
    made = index_shard(shard, layout=Layout(Kind.interleaved), tokenizer=tokenizer)
    made.save(shard)
    with (tmp_path / "x-000000.tar.index").open("rb") as file:
        head = json.loads(file.readline())
    assert (head["format"], head["documents"], head["images"]) == (index.FORMAT, 40, made.images)
    totals = read_totals(shard, layout=Layout(Kind.interleaved), tokenizer=tokenizer)
    assert totals == made.totals
    stored = load(shard, layout=Layout(Kind.interleaved), tokenizer=tokenizer)
    for name in index.ARRAYS:
        mapped, array = vars(stored)[name], vars(made)[name]
        assert (mapped.dtype, mapped.tolist()) == (array.dtype, array.tolist()), name
        assert not mapped.flags.writeable
    for image_tokens in (0, 1, 16, 10_000):
        lengths = stored.lengths(image_tokens)
        assert totals.tokens(image_tokens) == lengths.sum()
        assert totals.longest_tokens(image_tokens) == lengths.max()


def test_changed_bytes_and_failing_reads_stop_the_run(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", GOOD)
    raw = path.read_bytes()
    crc = zlib.crc32(raw[:1024])
    with pytest.raises(UserError, match="has changed since it was indexed"):
        document_bytes(path, start=0, stop=1025, crc=crc)
    path.write_bytes(raw[:1000])
    with pytest.raises(UserError, match="has changed since it was indexed"):
        document_bytes(path, start=0, stop=1024, crc=crc)
    path.unlink()
    with pytest.raises(UserError, match=r"No such file or directory\), after 2 tries"):
        document_bytes(path, start=0, stop=1024, crc=crc, store=Store(tries=2))


def test_processes_make_the_same_index_and_skip_what_is_fresh(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    corpora.write_shards(tmp_path, kind=Kind.caption, name="x", documents=30, per_shard=10, seed=0)
    shards = sorted(tmp_path.glob("*.tar"))
    alone = [
        index_shard(shard, layout=Layout(Kind.caption), tokenizer=tokenizer).digest
        for shard in shards
    ]
    made = index_shards(shards, layout=Layout(Kind.caption), tokenizer=tokenizer.path, workers=2)
    assert (made.shards, made.documents, made.images) == (3, 30, 30)
    stored = [load(shard, layout=Layout(Kind.caption), tokenizer=tokenizer) for shard in shards]
    assert [shard.digest for shard in stored] == alone
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.index"))]
    index_shards(shards, layout=Layout(Kind.caption), tokenizer=tokenizer.path)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.index"))] == written
    assert len(written) == len(shards) == 3


def test_the_command_prints_a_table_or_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_tar(tmp_path / "x.tar", [*GOOD, ("a.jpg", PICTURE)])
    flags = [
        "--kind",
        "caption",
        "--tokenizer",
        str(corpora.tokenizer_path()),
        "--workers",
        "1",
        "--shards",
    ]
    command.main([*flags, str(tmp_path / "*.tar")])
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if "missing" in line] == [
        ["missing_text", "1"]
    ]
    with pytest.raises(
        SystemExit, match=r"^error: --shards is .*nothing-\*\.tar, which matches no shard"
    ):
        command.main([*flags, str(tmp_path / "nothing-*.tar")])


def test_tokenizers_made_by_others_get_the_missing_ids(tmp_path: Path) -> None:
    ids = Tokenizer(corpora.tokenizer_path()).ids
    assert (ids.pad, ids.unk, ids.bos, ids.eos) == (0, 1, 2, 3)
    assert (ids.image, ids.size) == (ids.text_end, ids.text_end + 1)
    other = corpora.train_tokenizer(tmp_path / "x.model", pad_id=-1, unk_id=0, bos_id=-1, eos_id=1)
    ids = Tokenizer(other).ids
    assert (ids.image, ids.pad, ids.bos, ids.size) == (
        ids.text_end,
        ids.text_end + 1,
        ids.text_end + 2,
        ids.text_end + 3,
    )


def test_the_tokenizer_travels_and_ignores_specials(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "a red circle é"
    ids = copy.encode(text)
    assert (copy.hash, copy.ids, ids) == (tokenizer.hash, tokenizer.ids, tokenizer.encode(text))
    table = copy.ids
    assert copy.decode([table.bos, *ids, table.eos, table.image, table.pad, 10**6]) == text


def test_tokenizer_refusals(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match=r"cannot be read \(No such file or directory\); `python -m data"
    ):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_text("hello")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "text.model")
    with pytest.raises(
        UserError, match=f"model.vocab_size is 300 but .* needs {tokenizer.ids.size} ids"
    ):
        tokenizer.check_capacity(300)


def test_a_shard_that_is_gone_while_its_index_is_there_is_missed(tmp_path: Path) -> None:
    corpora.write_shards(tmp_path, kind=Kind.text, name="train", documents=6, per_shard=2, seed=0)
    shards = sorted(tmp_path.glob("*.tar"))
    index_shards(
        [str(path) for path in shards], layout=Layout(Kind.text), tokenizer=corpora.tokenizer_path()
    )
    shards[1].unlink()
    with pytest.raises(UserError, match=r"train-000001.tar is gone while its index is there"):
        find_shards(f"{tmp_path}/train-*.tar", key="--shards", store=LOCAL)
