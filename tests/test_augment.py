"""What an epoch makes of a document: drawn from its place alone, and nothing of it is held out."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.augment import text_first
from data.corpus import Corpus
from data.layout import Reader, build
from data.plan import Piece, plan_rows
from data.prepare.index import index_shards
from data.shards import ShardWriter
from nmm.batch import Modality, PackedBatch
from nmm.config import DataConfig, Kind
from nmm.errors import UserError
from tests import corpora


def caption_config(directory: Path | None = None, **changes: object) -> DataConfig:
    """Captions alone; SourceConfig fields in `source`."""
    config = corpora.config(directory)
    source = replace(config.sources["caption"], **dict(changes.pop("source", {})))
    return replace(config, sources={"caption": source}, **changes)


@pytest.fixture(scope="module")
def long_captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of 2 to 60 words, of which some do not fit a context of 64 with their image."""
    directory = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    for split in ("train", "held_out"):
        with ShardWriter(directory / "caption", name=split, documents_per_shard=20) as writer:
            for number in range(60):
                text = corpora.sentence(rng, int(rng.integers(2, 60)))
                writer.caption(f"{number}", image=corpora.jpeg(rng, width=40, height=24), text=text)
    shards = sorted((directory / "caption").glob("*.tar"))
    index_shards(shards, kind=Kind.caption, tokenizer=corpora.tokenizer_path())
    return directory


def pieces_of(corpus: Corpus, config: DataConfig, *, epochs: int) -> list[Piece]:
    """The pieces of whole epochs in the order of their documents."""
    capped = replace(config.sources["caption"], max_epochs=float(epochs))
    config = replace(config, sources={"caption": capped})
    opened = Corpus.open(config, image=corpora.IMAGE, vocab_size=corpora.VOCAB_SIZE, split="train")
    pieces = [piece for row, _ in plan_rows(opened, config) for piece in row]
    return sorted(pieces, key=lambda p: (p.epoch, p.shard, p.document, p.start))


def laid_out(pieces: list[Piece], corpus: Corpus, *, seed: int) -> Iterator[list[PackedBatch]]:
    """The pieces of one document after the other, each in a row of its own."""
    reader = Reader(corpus, seed=seed)
    of_document: list[PackedBatch] = []
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        of_document.append(build([[piece]], reader=reader, row_tokens=piece.stop - piece.start))
        if following is None or following.start == 0:
            yield of_document
            of_document = []


def test_the_asked_share_is_text_first_in_planning_and_reading(long_captions: Path) -> None:
    """Cut or not, pieces cover their document, whose image stands where the draw says."""
    config = caption_config(long_captions, source={"text_first_fraction": 0.3}, window_documents=16)
    corpus = corpora.open_corpus(config)
    pieces = pieces_of(corpus, config, epochs=8)
    shares, cuts_before_images = [], 0
    starts = [piece for piece in pieces if piece.start == 0]
    for piece, batches in zip(starts, laid_out(pieces, corpus, seed=config.seed), strict=True):
        modality = torch.cat([batch.modality[0] for batch in batches])
        labels = torch.cat([batch.labels[0] for batch in batches])
        image = (modality == Modality.image).nonzero().flatten().tolist()
        length = int(corpus.sources[0].shards[piece.shard].lengths[piece.document])
        assert len(modality) == length
        is_text_first = bool(
            text_first(
                np.array([piece.document]),
                fraction=0.3,
                seed=config.seed,
                epoch=piece.epoch,
                source=0,
                shard=piece.shard,
            )[0]
        )
        first = length - 17 if is_text_first else 1
        assert image == list(range(first, first + 16))
        assert labels[-2] == corpus.tokenizer.ids.eos
        assert all(len(batch.pixels) in (0, 1) for batch in batches)
        shares.append(is_text_first)
        cuts_before_images += is_text_first and len(batches) > 1
    assert len(shares) == 8 * 60
    assert np.mean(shares) == pytest.approx(0.3, abs=0.05)
    assert cuts_before_images > 20


def test_the_order_of_parts_is_drawn_anew_for_every_epoch_and_seed() -> None:
    def drawn(**place: int) -> np.ndarray:
        values = {"seed": 1, "epoch": 0, "source": 0, "shard": 0, **place}
        return text_first(np.arange(4000), fraction=0.4, **values)

    assert drawn().mean() == pytest.approx(0.4, abs=0.03)
    for other in (drawn(seed=2), drawn(epoch=1), drawn(source=1), drawn(shard=1)):
        assert (drawn() == other).mean() == pytest.approx(0.4**2 + 0.6**2, abs=0.04)
    assert not text_first(np.arange(9), fraction=0.0, seed=0, epoch=0, source=0, shard=0).any()
    assert text_first(np.arange(9), fraction=1.0, seed=0, epoch=0, source=0, shard=0).all()


def test_rows_of_captions_that_fit_do_not_move() -> None:
    """Only the cuts of long documents follow the order of their parts."""
    plain = caption_config(context_tokens=128)
    drawn = caption_config(context_tokens=128, source={"text_first_fraction": 0.5})
    plans = [
        [row for row, _ in islice(plan_rows(corpora.open_corpus(each), each), 60)]
        for each in (plain, drawn)
    ]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("kind", ["interleaved", "text"])
def test_only_captions_can_be_text_first(kind: str) -> None:
    config = corpora.config()
    with pytest.raises(
        UserError, match=rf"data\.sources\.{kind}\.text_first_fraction is 0\.5, but"
    ):
        replace(
            config,
            sources={kind: replace(config.sources[kind], text_first_fraction=0.5)},
        )
