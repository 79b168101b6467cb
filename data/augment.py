"""What differs between the epochs of a document: the order of its parts, the view of its images."""

import numpy as np

from data.draws import Purpose, key, uniforms


def text_first(
    documents: np.ndarray, *, fraction: float, seed: int, epoch: int, source: int, shard: int
) -> np.ndarray:
    """bool[n]: which documents of a shard are laid out text first in an epoch.

    Planning and reading both ask here: the cuts of a long document follow from its order.
    """
    if not fraction:
        return np.zeros(len(documents), bool)
    words = documents.astype(np.uint64)
    place = {"seed": seed, "epoch": epoch, "source": source, "shard": shard}
    return uniforms(key(Purpose.text_first, **place, document=words), 0) < fraction
