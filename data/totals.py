"""What is known of a shard without opening its index: sums, and the longest document."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Totals:
    """What the first line of an index says; `longest` leads to the longest document.

    skipped_images   images that documents name and their samples do not hold
    longest   (images, text tokens) of every document that no other exceeds in both
    digest    sha256 of all that is known of the documents
    """

    documents: int
    text_tokens: int
    images: int
    skipped_images: int
    longest: list[tuple[int, int]]
    digest: str

    def tokens(self, image_tokens: int) -> int:
        """Tokens of all documents in rows: text, image positions, begins and ends."""
        return self.text_tokens + image_tokens * self.images + 2 * self.documents

    def longest_tokens(self, image_tokens: int) -> int:
        """Tokens of the longest document in a row; 0 without any."""
        return max((2 + text + image_tokens * images for images, text in self.longest), default=0)

    @staticmethod
    def from_head(head: dict) -> "Totals":
        """From the first line of an index."""
        longest = [(images, text) for images, text in head["longest"]]
        names = ("documents", "text_tokens", "images", "skipped_images", "digest")
        return Totals(**{name: head[name] for name in names}, longest=longest)

    @staticmethod
    def count(
        text: np.ndarray, images: np.ndarray, skipped: np.ndarray, *, digest: str
    ) -> "Totals":
        """From the text tokens, the images and the skipped images of every document."""
        return Totals(
            documents=len(text),
            text_tokens=int(text.sum(dtype=np.int64)),
            images=int(images.sum(dtype=np.int64)),
            skipped_images=int(skipped.sum(dtype=np.int64)),
            longest=_longest(text, images),
            digest=digest,
        )


def _longest(text: np.ndarray, images: np.ndarray) -> list[tuple[int, int]]:
    """(images, text tokens) of the documents that no other exceeds in both, most images first."""
    front: list[tuple[int, int]] = []
    for document in np.lexsort((-text, -images)).tolist():
        if not front or text[document] > front[-1][1]:
            front.append((int(images[document]), int(text[document])))
    return front
