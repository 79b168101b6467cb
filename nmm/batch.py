"""PackedBatch: the one contract between data/ and nmm/model/, and who may attend to whom.

Legend of shapes: B rows, L tokens of a row (data.row_tokens), M images, H height, W width.
"""

from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

NO_LABEL = -100
# The keys of PackedBatch.counts.
COUNTS = ("documents", "cut_documents", "pieces", "padded_tokens", "skipped_images")


class Modality(IntEnum):
    """What a token is, as stored in `PackedBatch.modality`.

    The names are the NAME of `loss/modality/NAME`.
    """

    pad = 0
    text = 1
    image = 2
    speech = 3
    code = 4
    molecule = 5


@dataclass(frozen=True)
class Dropped:
    """A document that was planned and could not be read: its place in the row stays as padding.

    It is one of the `window_documents` documents of the window number `window`.
    """

    source: str
    shard: str
    key: str
    reason: str
    window: int
    window_documents: int


@dataclass
class PackedBatch:
    """B rows of L tokens, each row filled with whole pieces of documents and padded at its end.

    tokens    int64[B, L]    ids; image positions hold the image id, padding the pad id
    modality  uint8[B, L]    Modality
    source    uint8[B, L]    index of the source in the order of data.sources (0 also at padding)
    document  int32[B, L]    1, 2, ... within the row; 0 at padding
    image     int32[B, L]    1-based index into `pixels`; 0 where there is no image
    position  int32[B, L]    restarts at 0 with every document
    labels    int64[B, L]    id of the next token of the same document, or NO_LABEL
    label_modality  uint8[B, L]   Modality of the token that the label names; 0 without a label
    pixels    uint8[M, H, W, 3]   normalised on the device, not before
    keys      for every row, `shard/key` of its documents in order, for fault reports
    dropped   what could not be read while this batch was built
    counts    what happened to the documents of this batch, for the cumulative keys of losses.jsonl:
              documents        that begin in it, without those that could not be read
              cut_documents    those of them that are longer than the context
              pieces           that lie in it
              padded_tokens    positions of pieces that could not be read
              skipped_images   images that documents name and their samples do not hold

    Example, one row of 8 with an image of 2 tokens, then a text, then one position of padding
    ("b" begin, "e" end, "I" image):

        tokens    b I I x e  b y _
        document  1 1 1 1 1  2 2 0
        image     0 1 1 0 0  0 0 0
        labels    . . x e .  y . .
    """

    tokens: Tensor
    modality: Tensor
    source: Tensor
    document: Tensor
    image: Tensor
    position: Tensor
    labels: Tensor
    label_modality: Tensor
    pixels: Tensor
    keys: list[list[str]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        return replace(
            self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        )


def allowed(document: Tensor, image: Tensor) -> Tensor:
    """bool[B, L, L]: may query q attend to key k?

    Both must be of the same document, with k <= q or both in the same image: text is causal, an
    image sees all of itself. For the row of PackedBatch's example, first document:

        q\\k  b I I x e
        b     1 . . . .
        I     1 1 1 . .
        I     1 1 1 . .
        x     1 1 1 1 .
        e     1 1 1 1 1
    """
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    same_document = document[:, :, None] == document[:, None, :]
    same_image = (image[:, :, None] == image[:, None, :]) & (image > 0)[:, :, None]
    return same_document & (causal | same_image)
