"""From documents to rows: cutting what is longer than the context, and filling rows with pieces."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.sequences import IMAGE_SEGMENT, segment_tokens

MIN_FILL = (3, 4)
CLOSING_PIECES = 4
STRATA = 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio


@dataclass(frozen=True)
class Cuts:
    """The pieces of n documents: document i has [border[i], border[i+1]) of them.

    border       int64[n+1]
    start, stop  int32[p]    tokens [start, stop) of the document's sequence
    images       int32[p]    that lie in them
    spans        int32[p]    of them that are masked (data/masking.py)
    """

    border: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    images: np.ndarray
    spans: np.ndarray


# Tokens to leave free in the pieces of some documents (their numbers) that begin at given tokens.
Spare = Callable[[np.ndarray, np.ndarray], np.ndarray]


def uncut(lengths: np.ndarray, images: np.ndarray) -> Cuts:
    """Every document, of so many tokens and images, as one piece."""
    nothing = np.zeros_like(lengths)
    return Cuts(np.arange(len(lengths) + 1), nothing, lengths, images, nothing)


def cut(
    lengths: np.ndarray,
    *,
    segment: np.ndarray,
    border: np.ndarray,
    image_tokens: int,
    context_tokens: int,
    whole_units: bool = False,
    spare: Spare | None = None,
) -> Cuts:
    """The pieces of documents of `lengths` tokens, begin and end included.

    Document i has the segments [border[i], border[i+1]) of `segment`, as in an index. A document
    that fits is one piece. Otherwise a piece ends at the last segment border, if that leaves it
    three quarters full, else at a text token or unit; an image is never cut, nor, with
    `whole_units`, a run of units. With a context of 8, images of 3, and a document of 4 tokens, an
    image and 6 tokens:

        b x x x x I I I | y y y y y y e        pieces (0, 8), (8, 15)

    All pieces but the last leave what `spare` says of the context free.
    """
    ends = np.cumsum(segment_tokens(segment, image_tokens), dtype=np.int64)
    before = np.concatenate([[0], ends])[border[:-1]]
    is_patches = segment == IMAGE_SEGMENT
    is_whole = segment < 0 if whole_units else is_patches
    is_image = np.append(is_whole, False)
    seen = np.zeros(len(segment) + 1, np.int32)  # images before every segment
    np.cumsum(is_patches, out=seen[1:])
    # All documents that are still too long get their next cut at once.
    long = np.flatnonzero(lengths > context_tokens)
    start = np.zeros(len(long), np.int64)
    owners, cuts, images = [], [], []
    while len(long):
        begun = start
        limit = start + context_tokens - (0 if spare is None else spare(long, start))
        first, last = border[long], border[long + 1]
        # NOTE: empty texts of the next document share the end; they must not count.
        at = np.minimum(np.searchsorted(ends, before[long] + limit - 1, side="right"), last)
        edge = np.where(at > first, 1 + ends[at - 1] - before[long], 1)
        inside_image = (at < last) & is_image[at]
        full, of = MIN_FILL
        start = np.where(inside_image | (of * (edge - start) >= full * context_tokens), edge, limit)
        assert (start > begun).all(), "an image does not fit the context"
        owners.append(long.astype(np.int32))
        cuts.append(start.astype(np.int32))
        images.append(seen[at] - seen[first])
        left = lengths[long] - start > context_tokens
        long, start = long[left], start[left]
    whole = uncut(lengths, seen[border[1:]] - seen[border[:-1]])
    return _in_order(whole, owners, cuts, images) if owners else whole


def _in_order(
    whole: Cuts, owners: list[np.ndarray], cuts: list[np.ndarray], images: list[np.ndarray]
) -> Cuts:
    """Rounds of cuts, with the images before each, become pieces by document."""
    owner = np.concatenate(owners)
    by_document = np.argsort(owner, kind="stable")
    border = np.concatenate([[0], np.cumsum(1 + np.bincount(owner, minlength=len(whole.stop)))])
    is_last = np.zeros(border[-1], bool)
    is_last[border[1:] - 1] = True

    def ranges(of_cuts: list[np.ndarray], of_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a document's pieces begin and end with, counted along the document."""
        stop = np.empty(border[-1], np.int32)
        stop[is_last] = of_ends
        stop[~is_last] = np.concatenate(of_cuts)[by_document]
        start = np.empty_like(stop)
        start[1:] = stop[:-1]
        start[border[:-1]] = 0
        return start, stop

    start, stop = ranges(cuts, whole.stop)
    images_before, images_after = ranges(images, whole.images)
    return Cuts(border, start, stop, images_after - images_before, np.zeros_like(start))


def fill_rows(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Pieces of every row, nearly full: in order, with the last ones chosen to fit exactly.

    Pieces are taken as they come until about CLOSING_PIECES more would fill the row. From there
    on, one or two that fill it exactly are looked for among all; without any, the longest that
    fits is taken. So rows hold the mixture of the stream, and none holds long pieces only. In rows
    of 40 the 9 comes first, 12 is the longest that fits, and 11 and 8 fill the row:

        9 7 12 5 8 6 11 4        9 12 11 8 | 7 5 6 4
    """
    if not len(lengths):
        return []
    assert lengths.max() <= row_tokens, f"a piece of {lengths.max()} tokens in rows of {row_tokens}"
    pool = Pool(lengths, row_tokens)
    reach = closing_reach(lengths)
    rows: list[list[int]] = []
    while pool.present:
        row, left = pool.take_next(row_tokens, down_to=reach)
        while left and (length := pool.best(left)):
            row.append(pool.items[length].pop())
            pool.is_left[row[-1]] = 0
            left -= length
        if row:
            rows.append(row)
    return rows


def closing_reach(lengths: np.ndarray) -> int:
    """The tokens left in a row from which on its last pieces are chosen."""
    return CLOSING_PIECES * int(lengths.sum(dtype=np.int64)) // len(lengths)


def deal(tokens: np.ndarray) -> np.ndarray:
    """int64[R]: an order of rows in which every stretch holds the mixture of all of them.

    `tokens` int64[R, S] are those of every source in every row. Rows are laid along a line on which
    neighbours are alike: in strata by the source that differs most between rows, and to and fro by
    the next one within each. Steps of the golden ratio visit such a line evenly from the first on.
    All is done in whole numbers, so that every machine finds the same order.
    """
    rows = len(tokens)
    spread = rows * (tokens**2).sum(axis=0) - tokens.sum(axis=0) ** 2
    first, second = tokens[:, np.argsort(-spread, kind="stable")[[0, min(1, len(spread) - 1)]]].T
    stratum = _ranks(first) * STRATA // max(rows, 1)
    line = np.lexsort((np.where(stratum % 2, -second, second), stratum))
    return line[_ranks(np.arange(rows, dtype=np.uint64) * GOLDEN)]


def _ranks(values: np.ndarray) -> np.ndarray:
    """The place of every value in their ascending order."""
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks


class Pool:
    """Pieces that no row has yet, by their place in the stream and by length.

    Of all pieces, or of those in `only`; pools that share `is_left` share what is left. Bit n of
    `present` is set while a piece of n tokens may be left, as is bit row_tokens - n of `mirror`:
    shifted against each other, the two show all pairs of a given sum at once.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        row_tokens: int,
        *,
        only: np.ndarray | None = None,
        is_left: bytearray | None = None,
    ) -> None:
        self.lengths, self.row_tokens = lengths.tolist(), row_tokens
        self.is_left = bytearray(b"\1") * len(lengths) if is_left is None else is_left
        self.next = 0
        pieces = np.arange(len(lengths)) if only is None else only
        by_length = pieces[np.argsort(lengths[pieces], kind="stable")]
        found, first = np.unique(lengths[by_length], return_index=True)
        borders = [*first.tolist(), len(pieces)]
        items = by_length.tolist()
        self.items = {
            length: items[start:stop][::-1]
            for length, start, stop in zip(found.tolist(), borders, borders[1:], strict=False)
        }
        present = np.zeros(row_tokens + 1, bool)
        present[found] = True
        self.present, self.mirror = _bits(present), _bits(present[::-1])

    def take_next(self, left: int, *, down_to: int) -> tuple[list[int], int]:
        """Pieces in the order of the stream, and the `left` tokens that they leave of a row."""
        row: list[int] = []
        lengths, is_left, item = self.lengths, self.is_left, self.next
        while left > down_to and item < len(lengths):
            if is_left[item]:
                if lengths[item] > left:
                    break
                is_left[item] = 0
                row.append(item)
                left -= lengths[item]
            item += 1
        self.next = item
        return row, left

    def best(self, left: int) -> int:
        """Length of a piece that fills `left` tokens, alone or with another; else the longest."""
        if self.present >> left & 1 and self.has(left):
            return left
        # Bit n: there are pieces of n and of left - n. The most even pair keeps the rare lengths.
        half = (left + 1) // 2
        while pairs := (self.present & self.mirror >> (self.row_tokens - left)) >> half:
            length = (pairs & -pairs).bit_length() - 1 + half
            if self.has(length) and self.has(left - length):
                return length
        return self.longest(left)

    def longest(self, left: int) -> int:
        """Length of the longest piece of at most `left` tokens; 0 without any."""
        while fitting := self.present & ((2 << left) - 1):
            length = fitting.bit_length() - 1
            if self.has(length):
                return length
        return 0

    def has(self, length: int) -> bool:
        """Is a piece of this length left? If so, it is the last of its items; if not, say so."""
        items = self.items[length]
        while items and not self.is_left[items[-1]]:
            items.pop()
        if not items:
            self.present ^= 1 << length
            self.mirror ^= 1 << (self.row_tokens - length)
        return bool(items)


def _bits(flags: np.ndarray) -> int:
    """A number with bit n set where flag n is."""
    return int.from_bytes(np.packbits(flags, bitorder="little").tobytes(), "little")
