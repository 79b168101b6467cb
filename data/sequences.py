"""From the parts of a document to its tokens in a row.

A document's texts as ids, in reading order with None for every image and its runs of units, are its
`Texts`.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from data.documents import Parts
from data.tokenizer import IdTable, Tokenizer, UnitIds
from data.units import Units
from nmm.batch import NO_LABEL, Modality

IMAGE_SEGMENT = -1
UNIT_BORDERS = 2  # a run of units has a begin and an end
TEXT, IMAGE = int(Modality.text), int(Modality.image)  # looked up for every document

Texts = Many[Many[int] | np.ndarray | Units | None]


@dataclass(frozen=True)
class Sequence:
    """A document as n tokens, with its begin and end.

    tokens          int64[n]   image positions hold the image id
    modality        uint8[n]   Modality
    image           int32[n]   1-based index into the document's images; 0 elsewhere
    labels          int64[n]   id of the next token unless that is of an image, else NO_LABEL
    label_modality  uint8[n]   that of the next token where there is a label, else 0
    """

    tokens: np.ndarray
    modality: np.ndarray
    image: np.ndarray
    labels: np.ndarray
    label_modality: np.ndarray

    def part(self, start: int, stop: int) -> "Sequence":
        """Tokens [start, stop), without a copy."""
        return Sequence(
            self.tokens[start:stop],
            self.modality[start:stop],
            self.image[start:stop],
            self.labels[start:stop],
            self.label_modality[start:stop],
        )


def encode(parts: Parts, tokenizer: Tokenizer) -> Texts:
    """The ids of every text, None for an image; units as they are."""
    return [
        tokenizer.encode(part)
        if isinstance(part, str)
        else (part if isinstance(part, Units) else None)
        for part in parts
    ]


def segments(texts: Texts) -> np.ndarray:
    """int32[len(texts)]: tokens of every text, IMAGE_SEGMENT, or minus the positions of units."""
    return np.array([_segment(text) for text in texts], np.int32)


def segment_tokens(segments: np.ndarray, image_tokens: int) -> np.ndarray:
    """Positions that every segment takes in a row."""
    return np.where(segments == IMAGE_SEGMENT, image_tokens, np.abs(segments))


def sequence(
    texts: Texts, ids: IdTable, *, image_tokens: int, modality: Modality | None = None
) -> Sequence:
    """The token sequence of a document, whose units are of `modality`.

    With images of 2 tokens, [image, "x"] becomes the left one, and ["x", units 3 7] the other:

        tokens  b I I x e       b x < 3 7 > e
        image   0 1 1 0 0       0 0 0 0 0 0 0
        labels  . . x e .       x < 3 7 > e .
    """
    lengths = [image_tokens if text is None else abs(_segment(text)) for text in texts]
    size = 2 + sum(lengths)
    tokens, image = np.empty(size, np.int64), np.zeros(size, np.int32)
    kinds = np.full(size, TEXT, np.uint8)
    tokens[0], start, spans = ids.bos, 1, []
    for text, length in zip(texts, lengths, strict=True):
        stop = start + length
        if text is None:
            spans.append((start, stop))
            tokens[start:stop] = ids.image
            image[start:stop] = len(spans)
            kinds[start:stop] = IMAGE
        elif isinstance(text, Units):
            assert modality is not None
            tokens[start:stop] = unit_tokens(text, ids.units[modality])
            kinds[start + 1 : stop - 1] = modality
        else:
            tokens[start:stop] = text
        start = stop
    tokens[-1] = ids.eos
    labels, label_kinds = np.empty_like(tokens), np.empty_like(kinds)
    labels[:-1], label_kinds[:-1] = tokens[1:], kinds[1:]
    for start, stop in [*spans, (size, size + 1)]:  # nothing is behind the end
        labels[start - 1 : stop - 1], label_kinds[start - 1 : stop - 1] = NO_LABEL, 0
    return Sequence(tokens, kinds, image, labels, label_kinds)


def unit_tokens(units: Units, ids: UnitIds) -> np.ndarray:
    """int64[n + 2]: a run of n units as ids between its begin and its end."""
    return np.concatenate([[ids.begin], ids.first + units.values, [ids.end]])


def _segment(text: Many[int] | np.ndarray | Units | None) -> int:
    if text is None:
        return IMAGE_SEGMENT
    return -len(text) - UNIT_BORDERS if isinstance(text, Units) else len(text)
