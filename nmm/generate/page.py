"""What a model wrote, for people to look at: lines of JSON, a PNG of the first, one HTML page."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from data.pictures import png_url, write_png
from data.units import Units
from nmm.generate.prompts import AFTER, Prompt
from nmm.generate.seen import Seen
from nmm.generate.text import Written
from nmm.plot import BLACK, GREY, Panel, picture_figure

CSS = Path(__file__).with_name("page.css")
ON_PICTURE, ON_PAGE = 24, 240
SMALL_PIXELS = 128


@dataclass(frozen=True)
class Result:
    """A prompt, what others had after it (a text or an image), and what the model wrote."""

    prompt: Prompt
    reference: str | bytes | Units | None
    written: Written

    def said(self) -> str:
        """The document with what was written in its place; images by their names, or "[image]"."""
        written = (part if isinstance(part, str) else "[image]" for part in self.written.parts)
        before, after = self.prompt.said() + "".join(written), self.prompt.said_after()
        # Behind a hole a text begins with a word, as the model reads it.
        space = after[:1].isalnum() and before[-1:].strip() != ""
        return f"{before}{' ' if space else ''}{after}"


def write(
    results: Sequence[Result], directory: Path, *, name: str, title: str, said: str, seen: Seen
) -> list[Path]:
    """DIRECTORY/NAME.jsonl with all results, .png and .html with the first; returns the paths.

    Every image that was written is DIRECTORY/NAME/RESULT-IMAGE.png. `title` and `said` stand on top
    of the page; images are shown as the model sees them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines, picture, page = (directory / f"{name}.{form}" for form in ("jsonl", "png", "html"))
    rows = []
    for number, result in enumerate(results):
        files = [f"{name}/{number}-{place}.png" for place in range(len(result.written.images))]
        for file, image in zip(files, result.written.images, strict=True):
            write_png(image, directory / file)
        rows.append(_row(result, files=files))
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture_figure([_panel(result, seen=seen) for result in results[:ON_PICTURE]], picture)
    page.write_text(render(results, title=title, said=said, seen=seen), encoding="utf-8")
    return [lines, picture, page]


def render(results: Sequence[Result], *, title: str, said: str, seen: Seen) -> str:
    """The page; the same results give the same bytes."""
    left = len(results) - ON_PAGE
    more = f'<p class="more">{left:,} more are in the .jsonl file beside this page.</p>'
    articles = "\n".join(_article(result, seen=seen) for result in results[:ON_PAGE])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>\n<style>\n{CSS.read_text()}</style></head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n<p>{escape(said)}</p>\n"
        f"<main>\n{articles}\n</main>\n{more if left > 0 else ''}</body></html>\n"
    )


def _row(result: Result, *, files: Sequence[str]) -> dict[str, object]:
    """Keys of a line; texts and images stand as in a prompts file, images by their names."""
    row: dict[str, object] = {"key": result.prompt.name}
    if result.reference is None:
        names = iter(result.prompt.images)
        row |= _columns(result.prompt.parts, names=names)
        if result.prompt.after is not None:
            row |= _columns(result.prompt.after, names=names, prefix=AFTER)
    row |= {"written": result.written.text, "ended": result.written.ended}
    if files:
        row |= _columns(result.written.parts, names=iter(files), prefix="written_")
    if isinstance(result.reference, str):
        return row | {"reference": result.reference}
    return row if result.reference is None else row | {"prompt": result.prompt.said()}


def _columns(
    parts: Sequence[object], *, names: Iterator[str], prefix: str = ""
) -> dict[str, object]:
    """Two lists of equal length: texts, and the next names of images in their places."""
    places = [(part, None) if isinstance(part, str) else (None, next(names)) for part in parts]
    texts, images = ([place[column] for place in places] for column in (0, 1))
    return {f"{prefix}texts": texts, f"{prefix}images": images}


def _panel(result: Result, *, seen: Seen) -> Panel:
    """Images of the prompt, written ones, that of the reference; texts of the prompt in grey,
    written ones in black, the reference's in grey."""
    asked, written, reference = result.prompt, result.written, result.reference
    images = [seen.pixels(part) for part in asked.parts if not isinstance(part, str)]
    images += written.images
    images += [seen.pixels(part) for part in asked.after or [] if not isinstance(part, str)]
    texts = [(asked.said(), GREY)] if _has_text(asked) else []
    if written.text or not written.images:
        texts.append((written.text + ("" if written.ended else " …"), BLACK))
    if asked.after:
        texts.append((asked.said_after(), GREY))
    if isinstance(reference, str):
        texts.append((reference, GREY))
    elif reference is not None:
        images.append(seen.pixels(reference))
    return Panel(images, texts)


def _has_text(prompt: Prompt) -> bool:
    return any(isinstance(part, str) for part in prompt.parts)


def _article(result: Result, *, seen: Seen) -> str:
    asked = "".join(_part(part, "prompt", seen=seen) for part in result.prompt.parts)
    written = "".join(_part(part, "written", seen=seen) for part in result.written.parts)
    after = "".join(_part(part, "prompt", seen=seen) for part in result.prompt.after or [])
    more = "" if result.written.ended else '<span class="more" title="not ended"> …</span>'
    reference = result.reference
    compared = "" if reference is None else _part(reference, "reference", seen=seen)
    return (
        f"<article><h2>{escape(result.prompt.name)}</h2>{asked}"
        f'<div class="answer">{written}{more}</div>{after}{compared}</article>'
    )


def _part(part: str | bytes | Units | np.ndarray, role: str, *, seen: Seen) -> str:
    if isinstance(part, str):
        return f'<div class="said {role}">{escape(part)}</div>'
    pixels = part if isinstance(part, np.ndarray) else seen.pixels(part)
    small = " small" if len(pixels) < SMALL_PIXELS else ""
    return f'<img class="{role}{small}" alt="" src="{png_url(pixels)}">'
