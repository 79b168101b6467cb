"""The page of `python -m data.prepare.inspect`: facts about a corpus as one HTML document."""

from html import escape
from pathlib import Path

import numpy as np

from data.index import ShardIndex
from data.prepare.findings import DEFECTS
from data.prepare.inspect import rows
from data.prepare.inspect.drawing import Axis, bars_of_counts, chip, colour, fraction, histogram
from data.prepare.inspect.facts import Facts

CSS = Path(__file__).with_name("page.css")
NEUTRAL = "#777777"
MOST_IMAGES = 20


def render(facts: Facts) -> str:
    """The whole page; the same facts give the same bytes."""
    sections = (_head, _mixture, _fill, rows.rows, rows.attention, _lengths, _supply, _left_out)
    body = "\n".join(section(facts) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Planned rows</title>\n<style>\n{CSS.read_text()}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _head(facts: Facts) -> str:
    corpus, config = facts.corpus, facts.config
    sources = corpus.sources
    figures = [
        (f"{sum(source.documents for source in sources):,}", "documents"),
        (f"{sum(source.tokens for source in sources):,}", "tokens of text and images"),
        (f"{sum(source.images for source in sources):,}", "images"),
        (f"{config.row_tokens:,}", "tokens in a row"),
        (f"{config.context_tokens:,}", "tokens of context"),
        (f"{corpus.image.tokens:,}", f"tokens of an image of {corpus.image.side_pixels} pixels"),
        (fraction(float(np.mean(facts.fills)), digits=2), f"filled, of {len(facts.fills):,} rows"),
    ]
    boxes = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
    return (
        f"<h1>Planned rows of {', '.join(escape(source.name) for source in sources)}</h1>"
        f"<p>Seed {config.seed}, tokenizer {escape(corpus.tokenizer.path)}, "
        f"fingerprint {corpus.fingerprint[:12]}.</p>"
        f'<div class="figures">{boxes}</div>'
    )


def _mixture(facts: Facts) -> str:
    total = sum(facts.tokens)
    asked = _asked(facts)
    lines = [
        f"<tr><td>{chip(number, source.name)}</td><td>{source.weight:g}</td>"
        f"<td>{fraction(asked[number])}</td><td>{fraction(facts.tokens[number] / total)}</td>"
        f"<td>{100 * (facts.tokens[number] / total - asked[number]):+.3f}</td>"
        f"<td>{facts.tokens[number]:,}</td>"
        f"<td>{_bar(number, facts.tokens[number] / total, mark=asked[number])}</td></tr>"
        for number, source in enumerate(facts.corpus.sources)
    ]
    return (
        "<h2>Mixture: asked and planned</h2>"
        f"<p>Exact shares of the {total:,} tokens in the first {len(facts.fills):,} rows; the line "
        f"marks what was asked. These are whole windows of {facts.config.window_documents:,} "
        "documents: inside a window the rows are dealt evenly.</p>"
        "<table><tr><th>source</th><th>weight</th><th>asked</th><th>planned</th>"
        "<th>difference<br>in points</th><th>tokens</th><th></th></tr>"
        f"{''.join(lines)}</table>"
    )


def _fill(facts: Facts) -> str:
    fills = 100 * np.array(facts.fills)
    axis = Axis(np.floor(fills.min()), 100, log=False)
    padding = round(sum(1 - fill for fill in facts.fills) * facts.config.row_tokens)
    return (
        f"<h2>Fill of the planned rows</h2><p>{fraction(fills.mean() / 100)} of all positions, "
        f"{fraction(fills.min() / 100)} of the emptiest row; {padding:,} positions are padding. "
        "Below, rows by the share of their positions that is filled, in hundredths.</p>"
        f'<div class="single">{histogram(fills, axis, colour=NEUTRAL)}</div>'
    )


def _lengths(facts: Facts) -> str:
    sources = facts.corpus.sources
    tokens = [np.concatenate([shard.lengths for shard in source.shards]) for source in sources]
    images = [np.concatenate([_image_counts(shard.index) for shard in s.shards]) for s in sources]
    axis = Axis.of(tokens)
    context = facts.config.context_tokens
    most = min(MOST_IMAGES, max(int(counts.max()) for counts in images))
    cells = ["<div></div><div>tokens per document</div><div>images per document</div>"]
    for number, source in enumerate(sources):
        median, longest = int(np.median(tokens[number])), int(tokens[number].max())
        cut = int((tokens[number] > context).sum())
        cells.append(
            f"<div>{chip(number, source.name)}<small>{source.documents:,} documents</small>"
            f"<small>median {median:,}, longest {longest:,} tokens</small>"
            f"<small>{f'{cut:,} longer than the context: cut' if cut else ''}</small></div>"
            f"<div>{histogram(tokens[number], axis, colour=colour(number), limit=context)}</div>"
            f"<div>{bars_of_counts(images[number], most=most, colour=colour(number))}</div>"
        )
    return (
        "<h2>Lengths</h2><p>All documents of the index. The dashed line is the context of "
        f"{context:,} tokens{', the axis logarithmic' if axis.log else ''}; every source has its "
        f'own height.</p><div class="lengths">{"".join(cells)}</div>'
    )


def _supply(facts: Facts) -> str:
    sources, asked = facts.corpus.sources, _asked(facts)
    end = min(source.tokens / share for source, share in zip(sources, asked, strict=True))
    supply, rows = facts.corpus.supply_tokens(), facts.config.row_tokens
    lines = []
    for number, (source, share) in enumerate(zip(sources, asked, strict=True)):
        used = share * end / source.tokens
        lines.append(
            f"<tr><td>{chip(number, source.name)}</td><td>{len(source.shards):,}</td>"
            f"<td>{source.documents:,}</td><td>{source.tokens:,}</td>"
            f"<td>{source.text_tokens:,}</td><td>{source.images:,}</td>"
            f"<td>{source.unit_tokens:,}</td>"
            f"<td>{fraction(used, digits=1)}</td><td>{_bar(number, used)}</td></tr>"
        )
    return (
        f"<h2>Supply</h2><p>Without repetition the stream serves at least {supply:,} tokens, about "
        f"{supply // (rows * facts.config.global_rows):,} steps of {facts.config.global_rows:,} "
        "rows. It ends with the first source that does; of the others this much is used by then."
        "</p><table><tr><th>source</th><th>shards</th><th>documents</th><th>tokens</th>"
        "<th>text tokens</th><th>images</th><th>unit tokens</th>"
        "<th>used at<br>the end</th><th></th></tr>"
        f"{''.join(lines)}</table>"
    )


def _left_out(facts: Facts) -> str:
    lines = [
        f"<tr><td>{chip(number, facts.corpus.sources[number].name)}</td>"
        f'<td class="left">{escape(reason)}</td>'
        f'<td>{count:,}</td><td class="left">{escape(DEFECTS.get(reason, ""))}</td></tr>'
        for number, counts in enumerate(facts.dropped)
        for reason, count in counts.most_common()
    ]
    table = (
        f'<table><tr><th>source</th><th class="left">reason</th><th>samples</th>'
        f'<th class="left">meaning</th></tr>{"".join(lines)}</table>'
    )
    nothing = "<p>Nothing: every sample became a document.</p>"
    explanation = (
        "<p>Samples that the index could not make a document of; "
        "<code>python -m data.prepare.validate</code> lists them by shard and key.</p>"
    )
    missing = "".join(
        f"<p>{chip(number, source.name)}: {source.skipped_images:,} images that documents name are "
        "not in their samples; the texts are used without them.</p>"
        for number, source in enumerate(facts.corpus.sources)
        if source.skipped_images
    )
    return f"<h2>Left out</h2>{explanation + table if lines else nothing}{missing}"


def _asked(facts: Facts) -> list[float]:
    """The share of every source."""
    total = sum(source.weight for source in facts.corpus.sources)
    return [source.weight / total for source in facts.corpus.sources]


def _image_counts(index: ShardIndex) -> np.ndarray:
    """int[N]: images of every document."""
    return np.add.reduceat(index.segment < 0, index.border[:-1], dtype=np.int64)


def _bar(source: int, share: float, *, mark: float | None = None) -> str:
    line = "" if mark is None else f'<u style="left:{100 * mark:.3f}%"></u>'
    fill = f'<i style="width:{100 * share:.3f}%;background:{colour(source)}"></i>'
    return f'<div class="bar">{fill}{line}</div>'
