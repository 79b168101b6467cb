"""From the members of a sample to a document, and from a document to its token sequence.

A document is a list of parts in reading order, texts (str) and images (bytes); how samples
hold them is in docs/data-format.md.
"""

import json
from dataclasses import dataclass

import numpy as np

from data.tokenizer import Tokenizer
from nmm.batch import NO_LABEL
from nmm.config import Kind, Layout

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


def variants(layout: Layout, members: dict[str, bytes]) -> int:
    """Documents of a sample: one for each caption of a list, else 1; never raises."""
    if layout.kind is not Kind.caption or layout.text_field is None:
        return 1
    try:
        return len(_captions(members, layout.text_field))
    except BadSample:
        return 1


def parse(layout: Layout, members: dict[str, bytes], *, variant: int = 0) -> Parts:
    """The parts of a sample; members are named "jpg", "txt", "0.jpg", ...; raises BadSample.

    `variant` chooses the caption where there are several.
    """
    parts: Parts
    match layout.kind:
        case Kind.caption:
            parts = [_image(members), _caption(members, field=layout.text_field, variant=variant)]
        case Kind.interleaved:
            parts = _interleaved(members)
        case Kind.text:
            parts = [_plain_text(members, field=layout.text_field)]
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


def _image(members: dict[str, bytes]) -> bytes:
    images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
    if not images:
        raise BadSample("missing_image")
    if len(images) > 1:
        raise BadSample("several_images")
    return images[0]


def _caption(members: dict[str, bytes], *, field: str | None, variant: int) -> str:
    if field is None:
        return _text(_member(members, "txt", missing="missing_text"))
    return _string(_captions(members, field)[variant])


def _captions(members: dict[str, bytes], field: str) -> list:
    """The captions of an image as they are in its JSON: one, or a list of them."""
    value = _field(members, field)
    if isinstance(value, list) and not value:
        raise BadSample("empty_text")
    return value if isinstance(value, list) else [value]


def _plain_text(members: dict[str, bytes], *, field: str | None) -> str:
    if field is None:
        return _text(_member(members, "txt", missing="missing_text"))
    return _string(_field(members, field))


def _field(members: dict[str, bytes], name: str) -> object:
    """A field of the sample's JSON that is there and not null."""
    value = _json(members).get(name)
    if value is None:
        raise BadSample("missing_text")
    return value


def _string(value: object) -> str:
    if value is None:
        raise BadSample("empty_text")
    if not isinstance(value, str):
        raise BadSample("bad_text")
    return _clean(value)


def _json(members: dict[str, bytes]) -> dict:
    try:
        # ValueError: also for a number of thousands of digits, which Python refuses to convert.
        found = json.loads(_text(_member(members, "json", missing="missing_json")))
    except (ValueError, RecursionError):
        raise BadSample("bad_json") from None
    if not isinstance(found, dict):
        raise BadSample("bad_layout")
    return found


def _interleaved(members: dict[str, bytes]) -> Parts:
    texts, images = _lists(_json(members))
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


def _lists(layout: dict) -> tuple[list, list]:
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
