"""The drawn rows and the mask of one of them, as HTML."""

from html import escape

import numpy as np

from data.pictures import jpeg_url, png_url
from data.prepare.inspect.drawing import chip, colour, fraction, rgb, tint
from data.prepare.inspect.facts import DrawnPiece, DrawnRow, Facts, Mark
from data.units import Units

NARROW = 0.06  # of a row: no words fit into a smaller span
PICTURE_PIXELS = 96
HOVER_CHARACTERS, LISTED_CHARACTERS, LISTED_UNITS = 300, 1500, 24


def rows(facts: Facts) -> str:
    sources = enumerate(facts.corpus.sources)
    names = "".join(f"<span>{chip(number, source.name)}</span>" for number, source in sources)
    images: dict[str, str] = {}
    rows = "\n".join(_row(facts, row, images) for row in facts.rows)
    classes = "\n".join(
        f".{name} {{ background-image: url({url}); }}" for url, name in images.items()
    )
    spans = (
        "Striped: what data.masking moved to the end; a line is a sentinel or the end of a moved "
        "part, a number and > in the list. "
        if facts.config.masking.mean_spans
        else ""
    )
    return (
        f"<h2>The first {len(facts.rows)} rows</h2>"
        f'<p class="legend">{names}</p>'
        "<p>A span is a document, as wide as its tokens, with its number. Images lie at the tokens "
        "they take, cropped as the model receives them; units are dotted. A dashed edge: a piece "
        f"of a document that goes on elsewhere. Hatched: padding. {spans}Hover over a span for its "
        "text, or open the list.</p>"
        f"<style>\n{classes}\n</style>\n{rows}"
    )


def _row(facts: Facts, row: DrawnRow, images: dict[str, str]) -> str:
    length = facts.config.row_tokens
    ticks = "".join(
        f'<span style="left:{100 * n / 8:g}%">{length * n // 8:,}</span>' for n in range(9)
    )
    spans = "".join(
        _span(facts, piece, number=number, images=images)
        for number, piece in enumerate(row.pieces, start=1)
    )
    listed = "".join(
        _listed(facts, piece, number=number, images=images)
        for number, piece in enumerate(row.pieces, start=1)
    )
    count = f"{len(row.pieces)} span{'s' if len(row.pieces) != 1 else ''}"
    return (
        f'<section class="row"><header><b>row {row.number}</b>'
        f"<span>{fraction(facts.fills[row.number], digits=1)} full</span>"
        f"<span>{count}</span></header><div>"
        f'<div class="strip">{spans}</div><div class="axis">{ticks}</div>'
        f"<details{' open' if row.number == 0 else ''}><summary>{count}</summary>"
        f"<table>{listed}</table></details></div></section>"
    )


def _span(facts: Facts, piece: DrawnPiece, *, number: int, images: dict[str, str]) -> str:
    source, length = piece.piece.source, facts.config.row_tokens
    classes = ["piece"]
    classes += ["headless"] if piece.piece.start else []
    classes += ["tailless"] if piece.piece.stop < piece.document_tokens else []
    classes += ["dropped"] if piece.dropped else []
    pictures = "".join(
        f'<i class="picture {_image(part.content, images)}" '
        f'style="left:{100 * part.start / piece.tokens:.3f}%;'
        f"width:{100 * (part.stop - part.start) / piece.tokens:.3f}%;"
        f'background-color:{tint(source, strength=0.7)}"></i>'
        for part in piece.parts
        if isinstance(part.content, np.ndarray)
    )
    pictures += "".join(
        f'<i class="units" style="left:{100 * part.start / piece.tokens:.3f}%;'
        f'width:{100 * (part.stop - part.start) / piece.tokens:.3f}%;"></i>'
        for part in piece.parts
        if isinstance(part.content, Units)
    )
    marks = "".join(
        f'<i class="mark" style="left:{100 * part.start / piece.tokens:.3f}%"></i>'
        for part in piece.parts
        if isinstance(part.content, Mark)
    )
    if piece.moved:
        begin, end = piece.moved
        marks += (
            f'<i class="moved" style="left:{100 * begin / piece.tokens:.3f}%;'
            f'width:{100 * (end - begin) / piece.tokens:.3f}%"></i>'
        )
    words = " ".join(part.content for part in piece.parts if isinstance(part.content, str))
    shown = (
        ""
        if pictures or piece.tokens < NARROW * length
        else f"<q>{escape(words[:HOVER_CHARACTERS])}</q>"
    )
    hover = f"{number}: {facts.corpus.sources[source].name}, {_tokens(piece)}\n{piece.key}\n"
    hover += piece.dropped or words[:HOVER_CHARACTERS]
    background = "" if piece.dropped else f";background-color:{tint(source)}"
    return (
        f'<span class="{" ".join(classes)}" data-tokens="{piece.tokens}" title="{escape(hover)}" '
        f'style="left:{100 * piece.start / length:.4f}%;width:{100 * piece.tokens / length:.4f}%;'
        f'border-top-color:{colour(source)}{background}">{pictures}{marks}{shown}<em>{number}</em></span>'
    )


def _listed(facts: Facts, piece: DrawnPiece, *, number: int, images: dict[str, str]) -> str:
    said, left = [], LISTED_CHARACTERS
    for part in piece.parts:
        if isinstance(part.content, str):
            said.append(escape(part.content[:left]))
            left -= min(left, len(part.content))
        elif isinstance(part.content, Units):
            said.append(f'<span class="more">{escape(told_units(part.content))}</span>')
        elif isinstance(part.content, Mark):
            said.append(f"<b>{_named(part.content)}</b>")
        else:
            said.append(f'<i class="thumbnail {_image(part.content, images)}"></i>')
    hidden = sum(len(part.content) for part in piece.parts if isinstance(part.content, str))
    hidden -= LISTED_CHARACTERS - left
    if hidden:
        said.append(f' <span class="more">and {hidden:,} characters more</span>')
    if piece.dropped:
        said.append(f'<span class="more">not read ({escape(piece.dropped)}): padding</span>')
    return (
        f'<tr><td class="number">{chip(piece.piece.source)}{number}</td>'
        f'<td class="key">{escape(piece.key)}<br>{_tokens(piece)}</td>'
        f'<td class="said">{"".join(said)}</td></tr>'
    )


def _named(mark: Mark) -> str:
    """As docs/data-format.md writes them: a number for a sentinel, > for the end of a span."""
    return "&gt;" if mark.sentinel is None else f" {mark.sentinel} "


def told_units(units: Units) -> str:
    """How many units there are, and the first of them."""
    first = " ".join(map(str, units.values[:LISTED_UNITS].tolist()))
    return f" [{len(units):,} units: {first}{' ...' if len(units) > LISTED_UNITS else ''}] "


def attention(facts: Facts) -> str:
    mask = facts.mask
    pixels = np.full((*mask.allowed.shape, 3), 255, np.uint8)
    for source in range(len(facts.corpus.sources)):
        here = mask.allowed & (mask.source == source)[:, None]
        pixels[here] = rgb(tint(source, strength=0.45))
        pixels[here & mask.same_image] = rgb(colour(source))
    thinned = f" One position in {mask.step} is drawn." if mask.step > 1 else ""
    sources = enumerate(facts.corpus.sources)
    names = "<br>".join(chip(number, source.name) for number, source in sources)
    return (
        f"<h2>Attention in row {facts.masked}</h2>"
        f'<div class="mask"><img alt="attention mask" src="{png_url(pixels)}"><div>'
        "<p>A line is a query, a column a key; coloured where the query attends to the key. "
        "Light: earlier in the same document. Full colour: an image whose tokens all see each "
        f"other. White: another document, a later text, or padding.{thinned}</p>"
        f"<p>{names}</p></div></div>"
    )


def _image(pixels: object, images: dict[str, str]) -> str:
    """The CSS class that shows an image; each is embedded once."""
    assert isinstance(pixels, np.ndarray)
    return images.setdefault(jpeg_url(pixels, most_pixels=PICTURE_PIXELS), f"i{len(images)}")


def _tokens(piece: DrawnPiece) -> str:
    first, last, spans = piece.piece.start, piece.piece.stop, piece.piece.spans
    moved = f", {spans} span{'' if spans == 1 else 's'} at its end" if spans else ""
    if last - first == piece.document_tokens:
        return f"{piece.tokens:,} tokens{moved}"
    return f"tokens {first:,} to {last:,} of {piece.document_tokens:,}{moved}"
