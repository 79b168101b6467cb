"""What an epoch makes of a document: drawn from its place alone, and nothing of it is held out."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data.augment import text_first
from data.block import Blocks
from data.corpus import Corpus
from data.layout import Document, Reader, build
from data.loader import held_out_batches
from data.plan import Piece, plan_rows
from data.prepare.index import index_shards
from data.shards import ShardWriter
from nmm.batch import Modality, PackedBatch
from nmm.config import AugmentConfig, DataConfig, Kind, Layout
from nmm.errors import UserError
from tests import corpora
from tests.test_loader import rows, steps

PAPER = AugmentConfig(crop_area_fraction=0.4, flip=True)
PLACE = {"seed": 1, "epoch": 0, "source": 0, "shard": 0, "document": 0}


def jpeg(rng: np.random.Generator) -> bytes:
    return corpora.encoded(corpora.picture(rng, width=40, height=30), "JPEG", quality=95)


def caption_config(directory: Path | None = None, **changes: object) -> DataConfig:
    """Captions alone; SourceConfig fields in `source`."""
    config = corpora.config(directory)
    source = replace(config.sources["caption"], **dict(changes.pop("source", {})))
    return replace(config, sources={"caption": source}, **changes)


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of 2 to 60 words, of which some do not fit a context of 64; stories never do."""
    directory = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    for split in ("train", "held_out"):
        with ShardWriter(directory / "caption", name=split, documents_per_shard=20) as writer:
            for number in range(60):
                text = corpora.sentence(rng, int(rng.integers(2, 60)))
                writer.caption(f"{number}", image=jpeg(rng), text=text)
        with ShardWriter(directory / "interleaved", name=split, documents_per_shard=20) as writer:
            for number in range(30):
                parts = [(jpeg(rng), corpora.sentence(rng, 9)) for _ in range(6)]
                writer.interleaved(f"{number}", [part for pair in parts for part in pair])
    for kind in (Kind.caption, Kind.interleaved):
        shards = sorted((directory / kind.value).glob("*.tar"))
        index_shards(shards, layout=Layout(kind), tokenizer=corpora.tokenizer_path())
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
        of_document.append(
            build([[piece]], reader=reader, row_tokens=piece.stop - piece.start, blocks=Blocks())
        )
        if following is None or following.start == 0:
            yield of_document
            of_document = []


def test_the_asked_share_is_text_first_in_planning_and_reading(long_documents: Path) -> None:
    """Cut or not, pieces cover their document, whose image stands where the draw says."""
    config = caption_config(
        long_documents, source={"text_first_fraction": 0.3}, window_documents=16
    )
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


@pytest.fixture(scope="module")
def drawn(long_documents: Path) -> DataConfig:
    config = corpora.config(long_documents, augment=PAPER)
    del config.sources["text"]
    config.sources["caption"].text_first_fraction = 0.5
    return config


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    ("world", "micro_batch", "workers"), [(1, 2, 0), (2, 1, 0), (4, 2, 0), (2, 2, 2)]
)
def test_rows_do_not_depend_on_who_draws(
    world: int, micro_batch: int, workers: int, drawn: DataConfig
) -> None:
    """Several epochs; and again from the middle, by another number of processes."""
    corpus = corpora.open_corpus(drawn)
    count = 4 if workers else 24
    reference = steps(corpus, drawn, count=count)
    split = {"world": world, "micro_batch": micro_batch, "workers": workers}
    resumed = [
        *steps(corpus, drawn, count=count // 2),
        *steps(corpus, drawn, count=count // 2, state=reference[count // 2 - 1][1], **split),
    ]
    for found in (steps(corpus, drawn, count=count, **split), resumed):
        assert [state for _, state in found] == [state for _, state in reference]
        for (batches, _), (expected, _) in zip(found, reference, strict=True):
            assert rows(batches) == rows(expected)


def documents_of(corpus: Corpus, *, seed: int, epoch: int, source: int = 0) -> list[Document]:
    reader = Reader(corpus, seed=seed)
    shard = corpus.sources[source].shards[0]
    found = [reader.read(Piece(source, 0, n, 0, 1, epoch)) for n in range(len(shard.index))]
    return [each for each in found if isinstance(each, Document)]


def test_every_epoch_and_seed_shows_something_else(drawn: DataConfig) -> None:
    corpus = corpora.open_corpus(drawn)
    first = documents_of(corpus, seed=3, epoch=0)
    again, epoch, seed = (
        documents_of(corpus, seed=seed, epoch=epoch) for seed, epoch in ((3, 0), (3, 1), (4, 0))
    )
    assert len(first) == 20
    for one, two, three, four in zip(first, again, epoch, seed, strict=True):
        assert np.array_equal(one.pixels[0], two.pixels[0])
        assert not np.array_equal(one.pixels[0], three.pixels[0])
        assert not np.array_equal(one.pixels[0], four.pixels[0])


def test_all_pieces_of_a_document_show_the_same_images(drawn: DataConfig) -> None:
    """Each piece is read by another process; together they are the whole document."""
    corpus = corpora.open_corpus(drawn)
    plan = (piece for row, _ in islice(plan_rows(corpus, drawn), 400) for piece in row)
    cuts = sorted(
        (piece for piece in plan if (*piece[:3], piece.epoch) == (1, 0, 3, 1)),
        key=lambda piece: piece.start,
    )
    assert len(cuts) > 3
    whole = Reader(corpus, seed=drawn.seed).read(cuts[0])
    assert isinstance(whole, Document)
    shown = [
        build(
            [[cut]], reader=Reader(corpus, seed=drawn.seed), row_tokens=64, blocks=Blocks()
        ).pixels
        for cut in cuts
    ]
    assert np.array_equal(torch.cat(shown).numpy(), np.stack(whole.pixels))
    assert len({pixels.tobytes() for pixels in whole.pixels}) == 6


def test_the_held_out_split_is_never_drawn(drawn: DataConfig, long_documents: Path) -> None:
    plain = corpora.config(long_documents)
    del plain.sources["text"]
    found = []
    for config in (plain, drawn, replace(drawn, seed=99)):
        corpus = corpora.open_corpus(config, split="held_out")
        batches = held_out_batches(corpus, config, rows_per_source=20, micro_batch=4)
        found.append([row for _, of_source in batches for row in rows(of_source)])
    assert len(found[0]) > 30
    assert found[0] == found[1] == found[2]
