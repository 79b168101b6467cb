"""Packed batches for tests of the model, written by hand as rows of documents of segments.

A segment is a number of text tokens or IMAGE; `[[(3, IMAGE, 5), (4,)]]` is a row of two documents.
"""

import torch

from nmm.batch import NO_LABEL, Modality, PackedBatch
from nmm.config import AttentionBackend, ImageAttention, ImageConfig, ModelConfig

IMAGE = "image"
IMAGE_ID = 4
Document = tuple[int | str, ...]


def small(
    backend: AttentionBackend = AttentionBackend.auto,
    *,
    depth: int = 2,
    image_attention: ImageAttention = ImageAttention.block,
) -> ModelConfig:
    """A model of milliseconds: 9 patches per image."""
    return ModelConfig(
        width=32,
        depth=depth,
        heads=4,
        vocab_size=64,
        attention=backend,
        image_attention=image_attention,
        image=ImageConfig(side_pixels=12, patch_pixels=4),
    )


def pack(rows: list[list[Document]], *, config: ModelConfig, row_tokens: int) -> PackedBatch:
    """Documents with random ids and pixels, the same for the same call."""
    draw = torch.Generator().manual_seed(0)
    shape = (len(rows), row_tokens)
    batch = PackedBatch(
        tokens=torch.zeros(shape, dtype=torch.int64),
        modality=torch.zeros(shape, dtype=torch.uint8),
        source=torch.zeros(shape, dtype=torch.uint8),
        document=torch.zeros(shape, dtype=torch.int32),
        image=torch.zeros(shape, dtype=torch.int32),
        position=torch.zeros(shape, dtype=torch.int32),
        labels=torch.full(shape, NO_LABEL),
        label_modality=torch.zeros(shape, dtype=torch.uint8),
        pixels=torch.zeros(0, config.image.side_pixels, config.image.side_pixels, 3).byte(),
    )
    images = 0
    for b, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row, start=1):
            begin = at
            for segment in document:
                images += segment == IMAGE
                size = config.image.tokens if isinstance(segment, str) else segment
                here = (b, slice(at, at + size))
                is_image = segment == IMAGE
                ids = torch.randint(IMAGE_ID + 1, config.vocab_size, (size,), generator=draw)
                batch.tokens[here] = IMAGE_ID if is_image else ids
                batch.modality[here] = Modality.image if is_image else Modality.text
                batch.image[here] = images if is_image else 0
                at += size
            batch.document[b, begin:at] = number
            batch.position[b, begin:at] = torch.arange(at - begin)
            following = (b, slice(begin + 1, at))
            is_text = batch.modality[following] == Modality.text
            batch.labels[b, begin : at - 1] = torch.where(
                is_text, batch.tokens[following], NO_LABEL
            )
    batch.label_modality = torch.where(batch.labels == NO_LABEL, 0, Modality.text).byte()
    side = config.image.side_pixels
    batch.pixels = torch.randint(0, 256, (images, side, side, 3), generator=draw).byte()
    return batch


def random_rows(count: int, *, config: ModelConfig, row_tokens: int) -> list[list[Document]]:
    """Rows of documents with none to three images at any place, each row ending in padding."""
    draw = torch.Generator().manual_seed(1)
    rows: list[list[Document]] = []
    for _ in range(count):
        row: list[Document] = []
        left = row_tokens - 3
        while True:
            images = int(torch.randint(0, 4, (), generator=draw))
            texts = torch.randint(1, 12, (images + 1,), generator=draw).tolist()
            document = (texts[0], *(s for text in texts[1:] for s in (IMAGE, text)))
            left -= sum(texts) + images * config.image.tokens
            if left < 0:
                break
            row.append(document)
        rows.append(row)
    return rows
