"""What is known of a shard without opening its index: sums, and the longest document."""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class Totals:
    """What the first line of an index says; `longest` leads to the longest document.

    skipped_images   images that documents name and their samples do not hold
    unit_tokens      positions of all runs of units, with their begins and ends
    longest_units    positions of the longest run of units
    largest_unit     the largest number among the units, -1 without any
    token_bytes      size of the stored token ids, 0 without any
    longest   (images, other tokens) of every document that no other exceeds in both
    digest    sha256 of all that is known of the documents
    """

    documents: int
    text_tokens: int
    images: int
    skipped_images: int
    unit_tokens: int
    longest_units: int
    largest_unit: int
    token_bytes: int
    longest: list[tuple[int, int]]
    digest: str

    def tokens(self, image_tokens: int) -> int:
        """Tokens of all documents in rows: text, images, units, begins and ends."""
        others = self.text_tokens + self.unit_tokens + 2 * self.documents
        return others + image_tokens * self.images

    def longest_tokens(self, image_tokens: int) -> int:
        """Tokens of the longest document in a row; 0 without any."""
        lengths = (2 + others + image_tokens * images for images, others in self.longest)
        return max(lengths, default=0)

    @staticmethod
    def from_head(head: dict) -> "Totals":
        """From the first line of an index; KeyError, TypeError or ValueError for another line."""
        longest = [(int(images), int(others)) for images, others in head["longest"]]
        bytes.fromhex(head["digest"])
        names = [field.name for field in fields(Totals) if field.name != "longest"]
        found = Totals(**{name: head[name] for name in names}, longest=longest)
        if not all(isinstance(getattr(found, name), int) for name in names if name != "digest"):
            raise TypeError(f"no whole numbers: {found}")
        return found

    @staticmethod
    def count(
        text: np.ndarray,
        images: np.ndarray,
        skipped: np.ndarray,
        units: np.ndarray,
        *,
        longest_units: int,
        largest_unit: int,
        token_bytes: int,
        digest: str,
    ) -> "Totals":
        """From text tokens, images, skipped images and positions of units of every document."""
        return Totals(
            documents=len(text),
            text_tokens=int(text.sum(dtype=np.int64)),
            images=int(images.sum(dtype=np.int64)),
            skipped_images=int(skipped.sum(dtype=np.int64)),
            unit_tokens=int(units.sum(dtype=np.int64)),
            longest_units=longest_units,
            largest_unit=largest_unit,
            token_bytes=token_bytes,
            longest=_longest(text + units, images),
            digest=digest,
        )


def _longest(others: np.ndarray, images: np.ndarray) -> list[tuple[int, int]]:
    """(images, other tokens) of the documents that no other exceeds in both, most images first."""
    front: list[tuple[int, int]] = []
    for document in np.lexsort((-others, -images)).tolist():
        if not front or others[document] > front[-1][1]:
            front.append((int(images[document]), int(others[document])))
    return front
