"""Synthetic photographs as caption shards, so that benchmarks run without anybody's data."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data.shards import ShardWriter

QUALITY = 90
DOCUMENTS_PER_SHARD = 64
COARSE = 16
WORDS = ("light", "stone", "river", "cloud", "street", "window", "garden", "hill", "shadow", "door")


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG of about 400x600: smooth colours, soft shapes and fine noise, upright or lying.

    It has about the bytes of a photograph of this size, so decoding costs about the same.
    """
    width, height = (int(400 * rng.uniform(0.9, 1.1)), int(600 * rng.uniform(0.9, 1.1)))
    if rng.random() < 0.5:
        width, height = height, width
    coarse = rng.integers(0, 256, (COARSE, COARSE, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.normal(0, 6, (height, width, 1)) + rng.normal(0, 2, (height, width, 3))
    pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write(directory: Path, *, documents: int, seed: int = 0) -> None:
    """Write DIRECTORY/train-*.tar; the same arguments give the same bytes with one Pillow."""
    rng = np.random.default_rng(seed)
    with ShardWriter(directory, name="train", documents_per_shard=DOCUMENTS_PER_SHARD) as writer:
        for number in range(documents):
            words = rng.choice(WORDS, int(rng.integers(6, 24)))
            writer.caption(
                f"{number:06d}", image=photo(rng), text=f"A photo of {' and '.join(words)}."
            )
