"""From the members of a sample to a document, and from a document to its token sequence.

A document is a list of parts in reading order, texts (str) and images (bytes); how samples
hold them is in docs/data-format.md.
"""

import json
from dataclasses import dataclass

import numpy as np

from data.tokenizer import Tokenizer
from nmm.batch import NO_LABEL
from nmm.config import Kind

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")
IMAGE_SEGMENT = -1

Parts = list[str | bytes]


class BadSample(Exception):  # noqa: N818 - it is a verdict on a sample, counted and not fatal
    """A sample cannot become a document; `reason` is a stable name, counted as dropped/REASON."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Sequence:
    """A document as n tokens, with its begin and end.

    tokens  int64[n]   image positions hold the image id
    image   int32[n]   1-based index into the document's images; 0 elsewhere
    labels  int64[n]   id of the next token where that is text (so is the end), else NO_LABEL
    """

    tokens: np.ndarray
    image: np.ndarray
    labels: np.ndarray


def parse(kind: Kind, members: dict[str, bytes]) -> Parts:
    """The parts of a sample; members are named "jpg", "txt", "0.jpg", ...; raises BadSample."""
    parts: Parts
    match kind:
        case Kind.caption:
            parts = _caption(members)
        case Kind.interleaved:
            parts = _interleaved(members)
        case Kind.text:
            parts = [_text(_member(members, "txt", missing="missing_text"))]
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise BadSample("empty_text")
    return parts


def segments(parts: Parts, tokenizer: Tokenizer) -> np.ndarray:
    """int32[len(parts)]: tokens of every text, IMAGE_SEGMENT for an image.

    Raises BadSample for a document without any text token.
    """
    counts = [
        len(tokenizer.encode(part)) if isinstance(part, str) else IMAGE_SEGMENT for part in parts
    ]
    if max(counts) <= 0:
        raise BadSample("empty_text")
    return np.array(counts, np.int32)


def segment_tokens(segments: np.ndarray, image_tokens: int) -> np.ndarray:
    """Positions that every segment takes in a row."""
    return np.where(segments < 0, image_tokens, segments)


def sequence(
    parts: Parts, tokenizer: Tokenizer, *, image_tokens: int
) -> tuple[Sequence, np.ndarray]:
    """The token sequence of a document, and its segments as `segments` counts them.

    With images of 2 tokens, [image, "x"] becomes

        tokens  b I I x e
        image   0 1 1 0 0
        labels  . . x e .
    """
    ids, found = tokenizer.ids, [tokenizer.encode(p) if isinstance(p, str) else None for p in parts]
    counts = np.array([IMAGE_SEGMENT if text is None else len(text) for text in found], np.int32)
    size = 2 + int(segment_tokens(counts, image_tokens).sum())
    tokens, image = np.full(size, ids.image, np.int64), np.zeros(size, np.int32)
    labels = np.full(size, NO_LABEL, np.int64)
    tokens[0], start, images = ids.bos, 1, 0
    for text in found:
        stop = start + (image_tokens if text is None else len(text))
        if text is None:
            images += 1
            image[start:stop] = images
        else:
            tokens[start:stop] = text
            labels[start - 1 : stop - 1] = tokens[start:stop]
        start = stop
    tokens[-1] = labels[-2] = ids.eos
    return Sequence(tokens, image, labels), counts


def _caption(members: dict[str, bytes]) -> Parts:
    images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
    if not images:
        raise BadSample("missing_image")
    if len(images) > 1:
        raise BadSample("several_images")
    return [images[0], _text(_member(members, "txt", missing="missing_text"))]


def _interleaved(members: dict[str, bytes]) -> Parts:
    try:
        layout = json.loads(_text(_member(members, "json", missing="missing_json")))
    except (json.JSONDecodeError, RecursionError):
        raise BadSample("bad_json") from None
    texts, images = _lists(layout)
    parts: Parts = []
    for text, image in zip(texts, images, strict=True):
        if isinstance(text, str) and image is None:
            if text:
                parts.append(_clean(text))
        elif isinstance(image, str) and text is None:
            parts.append(_member(members, image.lower(), missing="missing_image"))
        else:
            raise BadSample("bad_layout")
    return parts


def _lists(layout: object) -> tuple[list, list]:
    if not isinstance(layout, dict):
        raise BadSample("bad_layout")
    texts, images = layout.get("texts"), layout.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadSample("bad_layout")
    return texts, images


def _member(members: dict[str, bytes], name: str, *, missing: str) -> bytes:
    if name not in members:
        raise BadSample(missing)
    return members[name]


def _text(data: bytes) -> str:
    try:
        return _clean(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadSample("not_utf8") from None


def _clean(text: str) -> str:
    """Line ends become \\n. NUL is the sign of another encoding; lone surrogates have none."""
    if "\0" in text:
        raise BadSample("nul_in_text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("not_utf8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
