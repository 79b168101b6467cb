"""The causal masked objective (CM3): spans of a piece move to its end, sentinels stay for them.

"CM3: A Causal Masked Multimodal Model of the Internet" (Aghajanyan et al. 2022), section 3, as
metaseq trains it: a Poisson number of spans, each between two uniform draws; the model predicts the
same tokens as without, and the end of every span, but no sentinel. What differs from metaseq:

* The unit is a piece of a document, so nothing crosses documents, and nothing is cut off: what a
  piece grows by is planned.
* Several spans are drawn as if again and again until none meets another, which is the same as
  pairing neighbours among their sorted ends. metaseq keeps those of n**2 spans that fit.
* An image stays whole, as in CM3Leon ("Scaling Autoregressive Multi-Modal Models", Yu et al. 2023),
  and the first and the last token of a piece stay where they are.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from data import pack
from data.draws import uniform, uniforms, within
from data.pack import Cuts
from data.sequences import IMAGE_SEGMENT, Sequence, segment_tokens
from data.tokenizer import MaskIds
from nmm.batch import NO_LABEL, Modality
from nmm.config import MaskingConfig

SPAN_TOKENS = 3  # a span leaves a sentinel where it was, and goes between that and an end
PIECE_SHARE = 4  # of a document that is cut, spans take up to 1 / PIECE_SHARE of the context
INSERTED = -1


def wanted(keys: np.ndarray, start: np.ndarray, *, config: MaskingConfig) -> np.ndarray:
    """int64[n]: spans drawn for the pieces that begin at token `start` of documents."""
    drawn = uniforms(within(keys, start.astype(np.uint64)), 0)
    return np.searchsorted(_poisson(config.mean_spans, config.sentinels), drawn, side="right")


def longest(tokens: int) -> int:
    """No document of so many tokens becomes longer: a span needs two places between them."""
    return tokens + SPAN_TOKENS * (tokens // 2)


def cut(
    lengths: np.ndarray,
    *,
    keys: np.ndarray,
    config: MaskingConfig,
    segment: np.ndarray,
    border: np.ndarray,
    image_tokens: int,
    context_tokens: int,
    whole_units: bool,
) -> Cuts:
    """The pieces of documents as by `pack.cut`, and how many spans of each are masked.

    As many as are drawn, if with them the piece fits the context and has places for them. Documents
    that fit are not cut for it; pieces of others are made shorter.
    """

    def spare(documents: np.ndarray, start: np.ndarray) -> np.ndarray:
        drawn = wanted(keys[documents], start, config=config)
        return SPAN_TOKENS * np.minimum(drawn, context_tokens // PIECE_SHARE // SPAN_TOKENS)

    layout = {"segment": segment, "border": border, "image_tokens": image_tokens}
    layout["whole_units"] = whole_units
    cuts = pack.cut(lengths, **layout, context_tokens=context_tokens, spare=spare)
    tokens = cuts.stop - cuts.start
    places = tokens - 1 - _inside_images(cuts, **layout)
    room = np.minimum((context_tokens - tokens) // SPAN_TOKENS, places // 2)
    owner = np.repeat(np.arange(len(lengths)), np.diff(cuts.border))
    drawn = wanted(keys[owner], cuts.start, config=config)
    return replace(cuts, spans=np.minimum(drawn, room).astype(np.int32))


def _inside_images(
    cuts: Cuts, *, segment: np.ndarray, border: np.ndarray, image_tokens: int, whole_units: bool
) -> np.ndarray:
    """int64[p]: the places between tokens of every piece that are inside of an image."""
    tokens = segment_tokens(segment, image_tokens)
    is_whole = segment < 0 if whole_units else segment == IMAGE_SEGMENT
    ends = np.cumsum(tokens, dtype=np.int64)
    inside = np.concatenate([[0], np.cumsum(np.where(is_whole, tokens - 1, 0), dtype=np.int64)])
    owner = np.repeat(np.arange(len(border) - 1), np.diff(cuts.border))
    first, last = border[owner], border[owner + 1]
    begins = np.concatenate([[0], ends])[first]

    def before(position: np.ndarray) -> np.ndarray:
        at = np.searchsorted(ends, begins + position - 1, side="right")
        return inside[np.clip(at, first, last)]

    return before(cuts.stop) - before(cuts.start)


@lru_cache(maxsize=1)
def _poisson(mean: float, most: int) -> np.ndarray:
    """float64[most]: the probabilities of at most 0, 1, ..., most - 1."""
    terms = [math.exp(-mean)]
    for number in range(1, most):
        terms.append(terms[-1] * mean / number)
    return np.cumsum(terms)


def spans_of(key: int, piece: Sequence, *, start: int, count: int) -> list[tuple[int, int]]:
    """`count` spans [first, last) of a piece in order, none of which touches or cuts an image.

    `start` is the token of its document that the piece begins at.
    """
    places = borders(piece)
    chosen: set[int] = set()
    # Floyd's algorithm: every set of 2 * count borders is equally likely.
    for number in range(2 * count):
        limit = len(places) - 2 * count + number
        at = int(uniform(within(key, start), 1 + number) * (limit + 1))
        chosen.add(limit if at in chosen else at)
    ends = places[sorted(chosen)].tolist()
    return list(zip(ends[::2], ends[1::2], strict=True))


def borders(piece: Sequence) -> np.ndarray:
    """int64[m]: the places in a piece where a span may begin or end; 3: before its token 3.

    Not before the first token, behind the last one, or inside an image of patches or codes.
    """
    patches = (piece.image[1:] == piece.image[:-1]) & (piece.image[1:] > 0)
    code = (piece.modality == Modality.image) & (piece.image == 0)
    return np.flatnonzero(~(patches | code[1:] | code[:-1])) + 1


def masked(piece: Sequence, spans: list[tuple[int, int]], *, ids: MaskIds) -> Sequence:
    """The piece with its spans at its end.

    Two spans of b x y z w e, with 0 and 1 for the sentinels and > for the end of a span:

        tokens   b x y z w e        b 0 y 1 w e 0 x > 1 z >
        labels   x y z w e .        . y . w e . x > . z > .
    """
    first, last = np.array(spans).T
    text, none = np.full(len(spans), Modality.text), np.zeros(len(spans), np.int64)
    sentinels = ids.first + np.arange(len(spans))
    new = _places(spans, length=len(piece.tokens))
    labels, kinds = piece.labels.copy(), piece.label_modality.copy()
    labels[first - 1], kinds[first - 1] = NO_LABEL, 0
    labels[last - 1], kinds[last - 1] = ids.end, Modality.text
    before, after = piece.labels[first - 1], piece.labels[last - 1]
    kind_before, kind_after = piece.label_modality[first - 1], piece.label_modality[last - 1]
    return Sequence(
        tokens=new.filled(piece.tokens, sentinels, opening=sentinels, closing=none + ids.end),
        modality=new.filled(piece.modality, text, opening=text, closing=text),
        image=new.filled(piece.image, none, opening=none, closing=none),
        labels=new.filled(labels, after, opening=before, closing=none + NO_LABEL),
        label_modality=new.filled(kinds, kind_after, opening=kind_before, closing=none),
    )


@dataclass(frozen=True)
class _Places:
    """Where the tokens of a masked piece come from; INSERTED where they are new."""

    take: np.ndarray

    def filled(
        self, old: np.ndarray, left: np.ndarray, *, opening: np.ndarray, closing: np.ndarray
    ) -> np.ndarray:
        """Values of a masked piece from the `old` ones, and those of what is new.

        The new ones are, for every span, what is `left` in its place, and what is around it.
        """
        found = old[self.take]
        around = np.stack([opening, closing], axis=1).ravel()
        found[self.take == INSERTED] = np.concatenate([left, around])
        return found


def _places(spans: list[tuple[int, int]], *, length: int) -> _Places:
    ends = [0, *(end for span in spans for end in span), length]
    parts = [np.arange(start, stop) for start, stop in pairwise(ends)]
    new = np.array([INSERTED])
    left = [part for kept in parts[:-1:2] for part in (kept, new)]
    moved = [part for span in parts[1::2] for part in (new, span, new)]
    return _Places(np.concatenate([*left, parts[-1], *moved]))
