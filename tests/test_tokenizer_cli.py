"""Training a tokenizer: same bytes twice, text back unchanged, its ids, its sample, refusals."""

import random
from pathlib import Path

import pytest
import sentencepiece

from data.prepare import tokenizer
from data.shards import ShardWriter
from data.tokenizer import Tokenizer
from nmm.config import Kind, Layout

PNG = b"\x89PNG\r\n\x1a\nnot decoded here"
SYLLABLES = [a + b for a in "bcdfghklmnprst" for b in "aeiou"]


def prose(seed: int, *, words: int) -> str:
    """Words of one to three syllables, in lines."""
    rng = random.Random(seed)
    found = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(words)]
    return "\n".join(" ".join(found[i : i + 9]) for i in range(0, words, 9))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    with ShardWriter(directory, name="caption", documents_per_shard=40) as writer:
        for index in range(100):
            writer.caption(f"{index}", image=PNG, text=f"caption {prose(index, words=20)}")
    with ShardWriter(directory, name="interleaved", documents_per_shard=100) as writer:
        for index in range(100):
            writer.interleaved(f"{index}", [PNG, prose(1000 + index, words=30), PNG, "END"])
    with ShardWriter(directory, name="text", documents_per_shard=50) as writer:
        writer.text("bad", "nul \0")
        for index in range(100):
            writer.text(f"{index}", prose(2000 + index, words=100))
    return directory


def train(shards: Path, out: Path, *extra: str, vocab_size: int = 600) -> Path:
    sources = [
        f"--source={kind}={shards}/{kind}-*.tar" for kind in ("caption", "interleaved", "text")
    ]
    tokenizer.main([*sources, f"--vocab-size={vocab_size}", f"--out={out}", *extra])
    return out


@pytest.fixture(scope="module")
def model(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(shards, tmp_path_factory.mktemp("model") / "tokenizer.model")


def test_sources_give_text_in_the_shares_of_their_weights(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = ("--weight=1", "--weight=2", "--weight=5")
    train(shards, tmp_path / "a.model", *weights, "--characters=16000", vocab_size=400)
    lines = capsys.readouterr().out.splitlines()[:3]
    found = [int(line.split()[1].replace(",", "")) for line in lines]
    assert found == pytest.approx([2000, 4000, 10_000], abs=900)  # whole documents
    for wrong in (weights[:2], ("--weight=1", "--weight=0", "--weight=5")):
        with pytest.raises(SystemExit, match="give every --source one above 0"):
            train(shards, tmp_path / "b.model", *wrong, vocab_size=400)


def test_the_same_shards_give_the_same_bytes(shards: Path, model: Path, tmp_path: Path) -> None:
    again = train(shards, tmp_path / "again.model")
    assert again.read_bytes() == model.read_bytes()
    small = ("--characters=9000",)
    first = train(shards, tmp_path / "a.model", *small, "--seed=1", vocab_size=400)
    second = train(shards, tmp_path / "b.model", *small, "--seed=2", vocab_size=400)
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "bato kelo",
        "  leading, two  inside, trailing  ",
        "emoji 😀👩\u200d🚀, accents é e\u0301 \ufb01, 日本語",
        "lines\n\n\tand\ttabs\r\n",
        "<s> </s> <pad> <unk> <0x41>",
        "\x01\x7f\ufeff\u2028\U0010ffff",
        "",
    ],
)
def test_decoding_gives_the_text_back(model: Path, text: str) -> None:
    found = Tokenizer(model)
    ids = found.encode(text)
    assert found.decode(ids) == text
    assert found.decode([found.ids.bos, *ids, found.ids.eos, found.ids.pad]) == text
    assert found.ids.unk not in ids


def test_every_character_comes_back_but_the_space_sign(model: Path) -> None:
    found = Tokenizer(model)
    for start in range(1, 0x3000, 0x100):
        text = "".join(map(chr, range(start, start + 0x100)))
        assert found.decode(found.encode(text)) == text.replace("\u2581", " ")


def test_special_ids_come_first_and_bytes_follow(model: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (pieces.pad_id(), pieces.unk_id(), pieces.bos_id(), pieces.eos_id()) == (0, 1, 2, 3)
    assert [pieces.id_to_piece(4 + byte) for byte in range(256)] == [
        f"<0x{byte:02X}>" for byte in range(256)
    ]
    assert pieces.vocab_size() == 600
    assert len(pieces.encode(prose(5, words=500))) < 0.5 * len(prose(5, words=500))


def test_the_sample_is_spread_over_documents_and_its_size_is_exact(shards: Path) -> None:
    paths = sorted(shards.glob("text-*.tar"))
    whole = list(tokenizer.sample(Layout(Kind.text), paths, characters=10**9, rng=random.Random(0)))
    assert sorted(whole) == sorted(prose(2000 + index, words=100) for index in range(100))
    part = list(tokenizer.sample(Layout(Kind.text), paths, characters=5000, rng=random.Random(0)))
    assert sum(map(len, part)) == 5000
    assert all(any(text.startswith(taken) for text in whole) for taken in part)
    interleaved = tokenizer.sample(
        Layout(Kind.interleaved),
        [shards / "interleaved-000000.tar"],
        characters=10**9,
        rng=random.Random(0),
    )
    assert all(text.endswith("\nEND") for text in interleaved)


def test_another_model_is_not_overwritten(shards: Path, model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(SystemExit, match="holds another model"):
        train(shards, model, vocab_size=500)
    train(shards, model)
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--vocab-size=100000"], "--vocab-size is 100000"),
        (["--vocab-size=100"], "--vocab-size is 100"),
        (["--characters=0"], "--characters is 0"),
        (["--source=prose=x"], "--source is prose=x"),
        (["--source=text=none/*.tar"], "--source text is none/\\*.tar"),
        ([f"--source=text={__file__}"], "matches no shard"),
    ],
)
def test_refusals(shards: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        train(shards, tmp_path / "t.model", *extra)
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.tar"
    page.write_text("<html>")
    with pytest.raises(SystemExit, match=r"page\.tar is not a tar"):
        tokenizer.main([f"--source=text={page}", f"--out={tmp_path}/t", "--vocab-size=400"])


def test_shards_of_another_kind_hold_no_text(shards: Path, tmp_path: Path) -> None:
    arguments = [f"--source=interleaved={shards}/text-*.tar", f"--out={tmp_path}/t"]
    with pytest.raises(SystemExit, match="holds no text; check its KIND"):
        tokenizer.main([*arguments, "--vocab-size=400"])
