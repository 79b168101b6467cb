"""From documents to rows: cutting what is longer than the context, and packing pieces best-fit."""

import numpy as np

from data.documents import segment_tokens

MIN_FILL = (3, 4)


def pieces(
    segments: np.ndarray, *, image_tokens: int, context_tokens: int
) -> list[tuple[int, int]]:
    """[start, stop) of every piece in a document's token sequence, begin and end included.

    A document that fits is one piece. Otherwise a piece ends at the last segment border, if that
    leaves it three quarters full, else at a text token; an image is never cut. With a context of 8,
    images of 3, and a document of 4 tokens, an image and 6 tokens:

        b x x x x I I I | y y y y y y e        pieces (0, 8), (8, 15)
    """
    ends = 1 + np.cumsum(segment_tokens(segments, image_tokens))
    total = int(ends[-1]) + 1
    cuts = [0]
    while total - cuts[-1] > context_tokens:
        cuts.append(_cut(segments, ends, start=cuts[-1], limit=cuts[-1] + context_tokens))
    return list(zip(cuts, [*cuts[1:], total], strict=True))


def _cut(segments: np.ndarray, ends: np.ndarray, *, start: int, limit: int) -> int:
    """Where the piece from `start` ends, at most at `limit`; `ends` are the segments' ends."""
    segment = int(np.searchsorted(ends, limit, side="right"))
    border = int(ends[segment - 1]) if segment else 1
    inside_image = segment < len(segments) and segments[segment] < 0
    full, of = MIN_FILL
    if inside_image or of * (border - start) >= full * (limit - start):
        assert border > start, f"an image does not fit a context of {limit - start} tokens"
        return border
    return limit


def best_fit(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Items of every row: the longest first, each into the fullest row that has room for it."""
    rows: list[list[int]] = []
    rows_with: dict[int, list[int]] = {}
    # Bit n is set while a row with n free tokens is open: the lowest from `length` up fits best.
    spaces = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        assert length <= row_tokens, f"a piece of {length} tokens in rows of {row_tokens}"
        fitting = spaces >> length
        if fitting:
            left = (fitting & -fitting).bit_length() - 1
            open_rows = rows_with[length + left]
            row = open_rows.pop()
            if not open_rows:
                spaces ^= 1 << (length + left)
        else:
            left, row = row_tokens - length, len(rows)
            rows.append([])
        rows[row].append(item)
        if left:
            rows_with.setdefault(left, []).append(row)
            spaces |= 1 << left
    return rows
