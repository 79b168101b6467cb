"""What an epoch makes of a document: drawn from its place alone, and nothing of it is held out."""

import math
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import Box, View, text_first, views
from data.corpus import Corpus
from data.images import decode
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


def picture(rng: np.random.Generator, *, width: int, height: int, blur: int = 4) -> Image.Image:
    """Smooth colours that differ everywhere."""
    coarse = rng.integers(0, 256, (-(-height // blur), -(-width // blur), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(rng: np.random.Generator) -> bytes:
    return encoded(picture(rng, width=40, height=30), "JPEG", quality=95)


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
        of_document.append(build([[piece]], reader=reader, row_tokens=piece.stop - piece.start))
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


def by_the_book(
    rng: np.random.Generator, *, height: int, width: int, least: float
) -> tuple[int, int, int, int]:
    """RandomResizedCrop as torchvision documents it, with another generator."""
    for _ in range(10):
        area = height * width * rng.uniform(least, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width", "least"), [(600, 400, 0.4), (300, 330, 0.08)])
def test_crops_are_distributed_as_they_should(height: int, width: int, least: float) -> None:
    """Deciles of area, ratio and place over 6,000 images, against a reference."""
    config = AugmentConfig(crop_area_fraction=least)
    rng = np.random.default_rng(0)
    found, expected = [], []
    for document in range(6000):
        (view,) = views(config, 1, **{**PLACE, "document": document})
        assert view is not None
        box = view.box(height, width)
        assert box is not None
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width
        found.append(box)
        expected.append(by_the_book(rng, height=height, width=width, least=least))
    for measure in (
        lambda top, left, h, w: h * w / (height * width),
        lambda top, left, h, w: math.log(w / h) + 1,
        lambda top, left, h, w: (top + h / 2) / height,
        lambda top, left, h, w: (left + w / 2) / width,
    ):
        deciles = [
            np.quantile([measure(*box) for box in boxes], np.linspace(0, 1, 11))
            for boxes in (found, expected)
        ]
        assert deciles[0] == pytest.approx(deciles[1], abs=0.02)


def test_half_of_the_images_are_flipped_whatever_their_crop() -> None:
    seen = [view for n in range(3000) for view in views(PAPER, 2, **{**PLACE, "document": n})]
    assert len(seen) == 6000
    flips, areas = [], []
    for view in seen:
        assert view is not None
        box = view.box(1000, 1000)
        assert box is not None
        flips.append(view.is_flipped)
        areas.append(box.height * box.width)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(flips, areas)[0, 1]) < 0.04
    assert abs(np.corrcoef(flips[::2], flips[1::2])[0, 1]) < 0.06
    assert not any(View(AugmentConfig(), view.key, 0).is_flipped for view in seen if view)
    assert views(AugmentConfig(), 3, **PLACE) == [None] * 3


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, Box(0, 493, 10, 13)),
        (1000, 10, Box(493, 0, 13, 10)),
        (1, 1, Box(0, 0, 1, 1)),
    ],
)
def test_what_is_too_narrow_for_any_crop_is_cut_in_its_middle(
    height: int, width: int, box: Box
) -> None:
    assert {View(PAPER, key, 0).box(height, width) for key in range(50)} == {box}


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    small = torch.nn.functional.interpolate(
        planes, size=(side, side), mode="bicubic", antialias=True
    )
    return small[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("key", range(12))
def test_a_view_is_the_crop_resized_and_flipped(key: int) -> None:
    """To the bit for a lossless file; a JPEG that the decoder shrinks is near Pillow's crop."""
    view = View(PAPER, key, 0)
    image = picture(np.random.default_rng(key), width=400, height=300, blur=100)
    box = view.box(300, 400)
    assert box is not None
    cut = np.asarray(image)[box.top : box.top + box.height, box.left : box.left + box.width]
    expected = resized(cut, 48)[:, :: -1 if view.is_flipped else 1]
    assert np.array_equal(decode(encoded(image, "PNG"), 48, view=view), expected)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    by_pillow = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC, box=corners))
    by_pillow = by_pillow[:, :: -1 if view.is_flipped else 1].astype(int)
    found = decode(encoded(image, "JPEG", quality=97, subsampling=0), 48, view=view)
    assert found.shape == (48, 48, 3)
    assert np.abs(found - by_pillow).mean() < 3
    whole = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - whole).mean() > 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_crop_is_one_of_the_upright_image(orientation: int) -> None:
    """However the camera stored it: the same part of the same picture, but for rounding."""
    image = picture(np.random.default_rng(0), width=360, height=240, blur=60)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = image.transpose(undo[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 97, "subsampling": 0}
    for side, most in ((200, 1), (48, 3)):  # the decoder leaves all pixels, or a quarter
        view = View(PAPER, 5, 0)
        found = decode(encoded(stored, "JPEG", exif=exif, **options), side, view=view)
        expected = decode(encoded(image, "PNG"), side, view=view)
        assert np.abs(found.astype(int) - expected).mean() < most


def test_the_decoder_leaves_as_many_pixels_as_are_asked_for() -> None:
    """A small crop of a fine pattern is not washed out by what the decoder left away."""
    lines = np.zeros((512, 512, 3), np.uint8)
    lines[:, ::4] = lines[:, 1::4] = 255
    data = encoded(Image.fromarray(lines), "JPEG", quality=97, subsampling=0)
    config = AugmentConfig(crop_area_fraction=0.01)
    seen = [(view, view.box(512, 512)) for key in range(200) if (view := View(config, key, 0))]
    small = [view for view, box in seen if box and max(box.height, box.width) < 128]
    assert len(small) > 5
    for view in small:
        assert decode(data, 128, view=view).astype(float).std() > 80


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
        build([[cut]], reader=Reader(corpus, seed=drawn.seed), row_tokens=64).pixels for cut in cuts
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


@pytest.mark.parametrize("fraction", [0.0, -0.4, 1.5])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"data\.augment\.crop_area_fraction is "):
        AugmentConfig(crop_area_fraction=fraction)
