"""What a model wrote, for people to look at: lines of JSON, a PNG of the first, one HTML page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from data.images import decode
from data.pictures import png_url
from nmm.generate.prompts import Prompt
from nmm.generate.text import Written
from nmm.plot import BLACK, GREY, Panel, picture_figure

CSS = Path(__file__).with_name("page.css")
ON_PICTURE, ON_PAGE = 24, 240
SMALL_PIXELS = 128


@dataclass(frozen=True)
class Result:
    """A prompt, what others had written after it, and what the model wrote."""

    prompt: Prompt
    reference: str | None
    written: Written


def write(
    results: Sequence[Result], directory: Path, *, name: str, title: str, said: str, side: int
) -> list[Path]:
    """DIRECTORY/NAME.jsonl with all results, .png and .html with the first; returns the paths.

    `title` and `said` stand on top of the page; images are shown as the model sees them, `side`
    pixels wide.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines, picture, page = (directory / f"{name}.{form}" for form in ("jsonl", "png", "html"))
    lines.write_text("".join(json.dumps(_row(result)) + "\n" for result in results))
    picture_figure([_panel(result, side=side) for result in results[:ON_PICTURE]], picture)
    page.write_text(render(results, title=title, said=said, side=side), encoding="utf-8")
    return [lines, picture, page]


def render(results: Sequence[Result], *, title: str, said: str, side: int) -> str:
    """The page; the same results give the same bytes."""
    left = len(results) - ON_PAGE
    more = f'<p class="more">{left:,} more are in the .jsonl file beside this page.</p>'
    articles = "\n".join(_article(result, side=side) for result in results[:ON_PAGE])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>\n<style>\n{CSS.read_text()}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n<p>{escape(said)}</p>\n"
        f"<main>\n{articles}\n</main>\n{more if left > 0 else ''}</body></html>\n"
    )


def _row(result: Result) -> dict[str, object]:
    """Keys of a line; texts and images stand as in a prompts file, images by their names."""
    row: dict[str, object] = {"key": result.prompt.name}
    names = iter(result.prompt.images)
    if result.reference is None:
        parts = result.prompt.parts
        places = [(p, None) if isinstance(p, str) else (None, next(names)) for p in parts]
        row |= {"texts": [text for text, _ in places], "images": [image for _, image in places]}
    row |= {"written": result.written.text, "ended": result.written.ended}
    return row if result.reference is None else row | {"reference": result.reference}


def _panel(result: Result, *, side: int) -> Panel:
    """Images, then the texts of the prompt in grey, what was written in black, the reference."""
    images = [decode(part, side) for part in result.prompt.parts if isinstance(part, bytes)]
    texts = [(result.prompt.said(), GREY)] if _has_text(result.prompt) else []
    texts.append((result.written.text + ("" if result.written.ended else " …"), BLACK))
    if result.reference is not None:
        texts.append((result.reference, GREY))
    return Panel(images, texts)


def _has_text(prompt: Prompt) -> bool:
    return any(isinstance(part, str) for part in prompt.parts)


def _article(result: Result, *, side: int) -> str:
    parts = "".join(_part(part, side=side) for part in result.prompt.parts)
    more = "" if result.written.ended else '<span class="more" title="not ended"> …</span>'
    reference = (
        ""
        if result.reference is None
        else f'<div class="said reference">{escape(result.reference)}</div>'
    )
    return (
        f"<article><h2>{escape(result.prompt.name)}</h2>{parts}"
        f'<div class="said written">{escape(result.written.text)}{more}</div>{reference}</article>'
    )


def _part(part: str | bytes, *, side: int) -> str:
    if isinstance(part, str):
        return f'<div class="said prompt">{escape(part)}</div>'
    small = ' class="small"' if side < SMALL_PIXELS else ""
    return f'<img{small} alt="" src="{png_url(decode(part, side))}">'
