"""The page draws exactly what is planned: every token, every piece, every image, once."""

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data.block import Blocks
from data.corpus import Corpus
from data.layout import Reader, build
from data.plan import plan_rows
from data.prepare.index import index_shards
from data.prepare.inspect import __main__ as command
from data.prepare.inspect import page
from data.prepare.inspect.facts import Facts, Mark, look, mask
from data.shards import ShardWriter
from nmm.config import (
    DataConfig,
    ImageAttention,
    Kind,
    Layout,
    MaskingConfig,
    SourceConfig,
)
from tests import corpora
from tests.batches import IMAGE, pack, small

ROWS = 6
VOID = {"meta", "img", "br", "line", "rect"}


class Page(HTMLParser):
    """Start tags with their attributes; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def of_class(self, name: str) -> list[dict[str, str]]:
        return [found for _, found in self.tags if name in found.get("class", "").split()]


@pytest.fixture(scope="module")
def config() -> DataConfig:
    return corpora.config(repeat=False)


@pytest.fixture(scope="module")
def corpus(config: DataConfig) -> Corpus:
    return corpora.open_corpus(config)


@pytest.fixture(scope="module")
def facts(corpus: Corpus, config: DataConfig) -> Facts:
    return look(corpus, config, rows=ROWS, planned_rows=10**6)


def test_tokens_planned_are_tokens_counted(
    facts: Facts, corpus: Corpus, config: DataConfig
) -> None:
    plan = [row for row, _ in plan_rows(corpus, config)]
    tokens = Counter({n: 0 for n in range(len(corpus.sources))})
    for piece in (piece for row in plan for piece in row):
        tokens[piece.source] += piece.stop - piece.start
    assert facts.tokens == [tokens[n] for n in range(len(corpus.sources))]
    assert len(facts.fills) == len(plan)
    assert sum(facts.fills) * config.row_tokens == pytest.approx(sum(facts.tokens))
    used = [drawn.tokens for row in facts.rows for drawn in row.pieces]
    assert used == [piece.stop - piece.start for row in plan[:ROWS] for piece in row]
    for row in facts.rows:
        ends = [0, *(piece.start + piece.tokens for piece in row.pieces)]
        assert [piece.start for piece in row.pieces] == ends[:-1]
        for piece in row.pieces:
            borders = [(part.start, part.stop) for part in piece.parts]
            assert [0, *(stop for _, stop in borders)] == [*(s for s, _ in borders), piece.tokens]


def test_the_plan_goes_on_to_the_end_of_a_window(corpus: Corpus, config: DataConfig) -> None:
    states = [state for _, state in plan_rows(corpus, config)]
    window = next(n for n, state in enumerate(states, start=1) if state.row == 0)
    assert 1 < window < len(states)
    assert len(look(corpus, config, rows=1, planned_rows=1).fills) == window


def test_one_span_for_every_piece_and_one_picture_for_every_image(
    facts: Facts, corpus: Corpus, config: DataConfig
) -> None:
    html = page.render(facts)
    found = Page(html)
    pieces = [piece for row in facts.rows for piece in row.pieces]
    spans = found.of_class("piece")
    assert [int(span["data-tokens"]) for span in spans] == [piece.tokens for piece in pieces]
    plan = [row for row, _ in plan_rows(corpus, config)][:ROWS]
    reader = Reader(corpus, seed=config.seed)
    batch = build(plan, reader=reader, row_tokens=config.row_tokens, blocks=Blocks())
    images = len(batch.pixels)
    assert len(found.of_class("picture")) == len(found.of_class("thumbnail")) == images > 5
    shown = {name for tag in found.of_class("picture") for name in tag["class"].split()} - {
        "picture"
    }
    assert all(html.count(f".{name} {{ background-image: url(data:") == 1 for name in shown)
    assert html == page.render(facts)


def test_moved_spans_are_marked_where_they_were_and_where_they_are(corpus: Corpus) -> None:
    """A sentinel twice and an end for each; what is behind the second sentinel 0 is striped."""
    config = corpora.config(repeat=False, masking=MaskingConfig(mean_spans=1.5, sentinels=6))
    facts = look(corpora.open_corpus(config), config, rows=ROWS, planned_rows=1)
    pieces = [piece for row in facts.rows for piece in row.pieces]
    for piece in pieces:
        borders = [(part.start, part.stop) for part in piece.parts]
        assert [0, *(stop for _, stop in borders)] == [*(s for s, _ in borders), piece.tokens]
        spans, marks = piece.piece.spans, [p for p in piece.parts if isinstance(p.content, Mark)]
        names = [mark.content.sentinel for mark in marks]
        assert all(mark.stop - mark.start == 1 for mark in marks)
        moved = [name for number in range(spans) for name in (number, None)]
        assert names == [*range(spans), *moved]
        assert piece.moved == ((marks[spans].start, piece.tokens) if spans else None)
    html = page.render(facts)
    found = Page(html)
    total = sum(piece.piece.spans for piece in pieces)
    assert total > 5
    assert len(found.of_class("mark")) == html.count("<b>&gt;</b>") * 3 == 3 * total
    assert len(found.of_class("moved")) == sum(piece.piece.spans > 0 for piece in pieces)
    assert "Striped" in html
    assert "Striped" not in page.render(look(corpus, corpora.config(), rows=1, planned_rows=1))


def test_the_page_needs_no_network(facts: Facts) -> None:
    html = page.render(facts)
    assert "http" not in html
    assert "@import" not in html
    tags = Page(html).tags
    assert {tag for tag, _ in tags} & {"script", "link", "iframe"} == set()
    assert all(found["src"].startswith("data:image/png") for _, found in tags if "src" in found)
    assert html.count("url(") == html.count("url(data:image/jpeg;base64,")


def test_texts_are_shown_as_text(tmp_path: Path) -> None:
    """Markup in a document or a key stays what it is."""
    said = "<b>if a < b & c</b><script>alert(1)</script>"
    with ShardWriter(tmp_path, name="x", documents_per_shard=9) as writer:
        for number in range(4):
            writer.text(f"<i>{number}", said)
    html = page.render(look(*corpus_of(tmp_path, kind=Kind.text), rows=1, planned_rows=1))
    tags = {tag for tag, _ in Page(html).tags}
    assert "script" not in tags
    assert "&lt;script&gt;" in html
    assert "x-000000.tar/&lt;i&gt;" in html


def corpus_of(folder: Path, *, kind: Kind) -> tuple[Corpus, DataConfig]:
    """The shards of a folder, indexed, as the only source."""
    index_shards(
        sorted(folder.glob("*.tar")), layout=Layout(kind), tokenizer=corpora.tokenizer_path()
    )
    shards = f"{folder}/*.tar"
    source = SourceConfig(kind=kind, train=shards, held_out=shards, weight=1.0)
    config = corpora.config(sources={"only": source}, repeat=False)
    return corpora.open_corpus(config), config


def test_what_cannot_be_read_is_drawn_as_dropped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path, name="x", documents_per_shard=9) as writer:
        writer.caption("good", image=corpora.jpeg(rng), text="a red circle.")
        writer.caption("half", image=corpora.jpeg(rng, width=64)[:-3], text="a red circle.")
        writer.caption("none", image=b"", text="a red circle.")
    facts = look(*corpus_of(tmp_path, kind=Kind.caption), rows=1, planned_rows=1)
    drawn = {piece.key: piece.dropped for piece in facts.rows[0].pieces}
    assert drawn == {"x-000000.tar/good": "", "x-000000.tar/half": "image_decode"}
    assert facts.dropped == [Counter({"missing_image": 1})]
    html = page.render(facts)
    assert len(Page(html).of_class("dropped")) == 1
    assert "not read (image_decode)" in html
    assert '<td class="left">missing_image</td>' in html


def test_the_mask_is_that_of_the_row(facts: Facts, corpus: Corpus, config: DataConfig) -> None:
    """Pairs of a causal document, and in every image the other half of its square."""
    pieces = facts.rows[facts.masked].pieces
    images = [p for piece in pieces for p in piece.parts if isinstance(p.content, np.ndarray)]
    squares = sum((image.stop - image.start) ** 2 for image in images)
    triangles = sum(piece.tokens * (piece.tokens + 1) // 2 for piece in pieces)
    upper = sum((i.stop - i.start) * (i.stop - i.start - 1) // 2 for i in images)
    assert facts.mask.step == 1
    assert facts.mask.same_image.sum() == squares
    assert facts.mask.allowed.sum() == triangles + upper
    assert squares > 0


@pytest.mark.parametrize(
    ("image_attention", "two_way_images"),
    [(ImageAttention.block, 2), (ImageAttention.prefix, 1), (ImageAttention.causal, 0)],
)
def test_the_mask_is_that_of_the_config(
    image_attention: ImageAttention, two_way_images: int
) -> None:
    batch = pack([[(1, IMAGE, 4, IMAGE, 2)]], config=small(), row_tokens=30)
    found = mask(batch, image_attention=image_attention)
    assert found.same_image.sum() == two_way_images * 81


def test_long_rows_are_thinned(corpus: Corpus, config: DataConfig) -> None:
    long = replace(config, row_tokens=64 * 33, window_documents=120)
    mask = look(corpus, long, rows=1, planned_rows=1).mask
    assert (mask.step, mask.allowed.shape) == (3, (704, 704))
    assert np.array_equal(mask.allowed, mask.allowed & mask.allowed.any(axis=1)[:, None])


YAML = """
sources:
  only: {{kind: text, train: '{0}/*.tar', held_out: '{0}/*.tar', weight: 1}}
tokenizer: {1}
context_tokens: 128
row_tokens: 256
global_rows: 2
"""


def test_the_command_writes_one_file_or_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with ShardWriter(tmp_path, name="x", documents_per_shard=99) as writer:
        for number in range(40):
            writer.text(f"{number}", f"a red circle {number}")
    corpus_of(tmp_path, kind=Kind.text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(YAML.format(tmp_path, corpora.tokenizer_path()))
    out = tmp_path / "pages" / "mine.html"
    flags = ["--config-dir", str(tmp_path), "data=mine", "--out", str(out)]
    command.main([*flags, "--rows", "2"])
    assert capsys.readouterr().out.startswith(f"wrote {out} (")
    assert len(Page(out.read_text()).of_class("row")) == 2
    command.main([*flags, "--rows", "1", "data.row_tokens=128", "schedule.total_steps=3"])
    assert len(Page(out.read_text()).of_class("row")) == 1
    for more, sentence in (
        (["--rows", "0"], "--rows is 0; set 1 or more"),
        (["data=nowhere"], "data/nowhere"),
        (["data.row_token=5"], "row_token"),
        (["data.row_tokens=200"], "data.row_tokens is 200 and data.context_tokens is 128"),
        (["model.vocab_size=5"], "model.vocab_size is 5"),
        (["--out", str(tmp_path)], "which cannot be written"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main([*flags, *more])
        message = str(stop.value.code)
        assert message.startswith("error: ")
        assert sentence in message
        assert "\n" not in message
