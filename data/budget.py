"""Filling rows under a second limit: no row holds more images than data.max_row_images."""

import numpy as np

from data.pack import Pool, closing_reach


def fill_rows_within(
    lengths: np.ndarray, row_tokens: int, *, images: np.ndarray, max_images: int
) -> list[list[int]]:
    """Pieces of every row, chosen much as `pack.fill_rows` does, with at most `max_images` images.

    `images` are those of every piece. A row takes pieces as they come until one does not fit,
    because of its tokens or its images, and is closed by pieces that fit in both. Of these it takes
    the ones with the most images, because those without must last for the rows that may have no
    more.
    """
    if not len(lengths):
        return []
    most = int(images.max())
    assert lengths.max() <= row_tokens, f"a piece of {lengths.max()} tokens in rows of {row_tokens}"
    assert most <= max_images, f"a piece of {most} images in rows of {max_images}"
    stream = _Stream(lengths, images)
    pools = [
        Pool(lengths, row_tokens, only=np.flatnonzero(images == number), is_left=stream.is_left)
        for number in range(most + 1)
    ]
    reach = closing_reach(lengths)
    rows: list[list[int]] = []
    while any(pool.present for pool in pools):
        row, left, room = stream.take_next(row_tokens, max_images, down_to=reach)
        while left and (found := _best(pools, left, room)):
            number, length = found
            row.append(pools[number].items[length].pop())
            stream.is_left[row[-1]] = 0
            left -= length
            room -= number
        if row:
            rows.append(row)
    return rows


class _Stream:
    """The pieces in their order; those that are `is_left` have no row yet."""

    def __init__(self, lengths: np.ndarray, images: np.ndarray) -> None:
        self.lengths, self.images = lengths.tolist(), images.tolist()
        self.is_left = bytearray(b"\1") * len(lengths)
        self.next = 0

    def take_next(self, left: int, room: int, *, down_to: int) -> tuple[list[int], int, int]:
        """Pieces in order, and the tokens `left` and the `room` for images that they leave."""
        row: list[int] = []
        lengths, images, is_left, item = self.lengths, self.images, self.is_left, self.next
        while left > down_to and item < len(lengths):
            if is_left[item]:
                if lengths[item] > left or images[item] > room:
                    break
                is_left[item] = 0
                row.append(item)
                left -= lengths[item]
                room -= images[item]
            item += 1
        self.next = item
        return row, left, room


def _best(pools: list[Pool], left: int, room: int) -> tuple[int, int] | None:
    """(images, length) of a piece that fills `left` tokens, alone or with another.

    Else of the longest that fits; None without any. `pools` are by the images of their pieces, of
    which there is `room` for so many.
    """
    most = min(room, len(pools) - 1)
    richest_first = range(most, -1, -1)
    for number in richest_first:
        if pools[number].present >> left & 1 and pools[number].has(left):
            return number, left
    for images in range(min(room, 2 * most), -1, -1):
        numbers = range(max(0, images - most), min(images, most) + 1)
        longer = [(_pair(pools[n], pools[images - n], left=left), n) for n in numbers]
        if fitting := [(length, number) for length, number in longer if length]:
            length, number = min(fitting)  # the most even pair keeps the rare lengths
            return number, length
    length, number = max((pools[number].longest(left), number) for number in richest_first)
    return (number, length) if length else None


def _pair(pool: Pool, other: Pool, *, left: int) -> int:
    """Length of a piece of `pool` that fills `left` with one of `other` that is not longer.

    The least such length; 0 without a pair.
    """
    half = (left + 1) // 2
    while pairs := (pool.present & other.mirror >> (other.row_tokens - left)) >> half:
        length = (pairs & -pairs).bit_length() - 1 + half
        if pool.has(length) and other.has(left - length):
            return length
    return 0
