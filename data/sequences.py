"""From the parts of a document to its tokens in a row.

A document's texts as ids, in reading order with None for every image, are its `Texts`.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from data.documents import Parts
from data.tokenizer import IdTable, Tokenizer
from nmm.batch import NO_LABEL

IMAGE_SEGMENT = -1

Texts = Many[Many[int] | np.ndarray | None]


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


def encode(parts: Parts, tokenizer: Tokenizer) -> Texts:
    """The ids of every text, None for an image."""
    return [tokenizer.encode(part) if isinstance(part, str) else None for part in parts]


def segments(texts: Texts) -> np.ndarray:
    """int32[len(texts)]: tokens of every text, IMAGE_SEGMENT for an image."""
    return np.array([IMAGE_SEGMENT if text is None else len(text) for text in texts], np.int32)


def segment_tokens(segments: np.ndarray, image_tokens: int) -> np.ndarray:
    """Positions that every segment takes in a row."""
    return np.where(segments < 0, image_tokens, segments)


def sequence(texts: Texts, ids: IdTable, *, image_tokens: int) -> Sequence:
    """The token sequence of a document.

    With images of 2 tokens, [image, "x"] becomes

        tokens  b I I x e
        image   0 1 1 0 0
        labels  . . x e .
    """
    size = 2 + int(segment_tokens(segments(texts), image_tokens).sum())
    tokens, image = np.full(size, ids.image, np.int64), np.zeros(size, np.int32)
    labels = np.full(size, NO_LABEL, np.int64)
    tokens[0], start, images = ids.bos, 1, 0
    for text in texts:
        stop = start + (image_tokens if text is None else len(text))
        if text is None:
            images += 1
            image[start:stop] = images
        else:
            tokens[start:stop] = text
            labels[start - 1 : stop - 1] = tokens[start:stop]
        start = stop
    tokens[-1] = labels[-2] = ids.eos
    return Sequence(tokens, image, labels)
