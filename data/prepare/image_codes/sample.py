"""A sample of the images of shards, spread over the shards and over the documents of each."""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random

import numpy as np

from data.images import decode
from data.prepare.convert.left_out import LeftOut
from data.prepare.image_codes.documents import read
from data.samples import BadSample
from data.store import LOCAL
from nmm.config import Layout

LEAST_PER_SHARD = 500

Sources = Sequence[tuple[Layout, Sequence[str]]]


def sample(sources: Sources, *, images: int, side_pixels: int, seed: int) -> np.ndarray:
    """uint8[at most `images`, S, S, 3] in random order, in equal parts from every source.

    A small sample of a large corpus opens only as many shards as give it 500 images each.
    """
    found: list[np.ndarray] = []
    for number, (layout, shards) in enumerate(sources):
        rng = Random(f"{seed} {number}")
        quota = (images - len(found)) // (len(sources) - number)
        found += islice(_images(layout, shards, images=quota, side=side_pixels, rng=rng), quota)
    Random(seed).shuffle(found)
    return np.array(found, np.uint8).reshape(-1, side_pixels, side_pixels, 3)


def _images(
    layout: Layout, shards: Sequence[str], *, images: int, side: int, rng: Random
) -> Iterator[np.ndarray]:
    shards = rng.sample(shards, len(shards))
    for position, shard in enumerate(shards):
        quota = min(images, max(LEAST_PER_SHARD, -(-images // (len(shards) - position))))
        for image in _of_shard(layout, shard, images=quota, rng=rng):
            try:
                yield decode(image, side)
            except BadSample:
                continue
            images -= 1
        if images <= 0:
            return


def _of_shard(layout: Layout, shard: str, *, images: int, rng: Random) -> list[bytes]:
    """So many of its images, each as likely as any other (reservoir sampling), still encoded."""
    kept: list[bytes] = []
    with LOCAL.local(shard) as path:
        found = (image for d in read(path, layout, left_out=LeftOut()) for image in d.images)
        for seen, image in enumerate(found):
            if seen < images:
                kept.append(image)
            elif (place := rng.randrange(seen + 1)) < images:
                kept[place] = image
    return kept
