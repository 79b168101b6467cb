"""PackedBatch: the one contract between data/ and nmm/model/, and who may attend to whom.

Legend of shapes: B rows, L tokens of a row (data.row_tokens), M images, H height, W width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from nmm.config import ImageAttention

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

    @property
    def flat_keys(self) -> list[str]:
        """`keys` of all rows."""
        return [key for row in self.keys for key in row]

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        return replace(
            self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        )


PairRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def pair_rule(document: Tensor, two_way_image: Tensor) -> PairRule:
    """rule(b, q, k): in row b, may the query at position q attend to the key at position k?

    Both must be of the same document, with k <= q or both in the same two-way image. The three
    int64 tensors broadcast; `document` and `two_way_image` are int[B, L], the latter of `two_way`.
    """

    def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        image = two_way_image[b, q]
        same_image = (image == two_way_image[b, k]) & (image > 0)
        return (document[b, q] == document[b, k]) & ((k <= q) | same_image)

    return rule


def two_way(document: Tensor, image: Tensor, *, attention: ImageAttention) -> Tensor:
    """`image` int[B, L] with 0 for the images whose patches see only what is before them.

    An image begins its document when at most one token (the begin of the document) is before it.
    A row of two documents, "b" begin, "I" image, "x" text:

        tokens    b I I x I I   b x I I
        image     0 1 1 0 2 2   0 0 3 3
        block     0 1 1 0 2 2   0 0 3 3
        prefix    0 1 1 0 0 0   0 0 0 0
        causal    0 0 0 0 0 0   0 0 0 0
    """
    match attention:
        case ImageAttention.block:
            return image
        case ImageAttention.causal:
            return torch.zeros_like(image)
        case ImageAttention.prefix:
            return image * (first_column(image) - first_column(document) <= 1)


def first_column(run: Tensor) -> Tensor:
    """int64[B, L]: the column where the run of equal values around each position begins.

    For [7, 7, 3, 3, 3] it is [0, 0, 2, 2, 2].
    """
    column = torch.arange(run.shape[1], device=run.device)
    begins = torch.ones_like(run, dtype=torch.bool)
    begins[:, 1:] = run[:, 1:] != run[:, :-1]
    return torch.where(begins, column, 0).cummax(dim=1).values


def allowed(document: Tensor, two_way_image: Tensor) -> Tensor:
    """bool[B, L, L]: `pair_rule` of every query and key.

    Text is causal, an image of `two_way_image` sees all of itself. For the row of PackedBatch's
    example, first document:

        q\\k  b I I x e
        b     1 . . . .
        I     1 1 1 . .
        I     1 1 1 . .
        x     1 1 1 1 .
        e     1 1 1 1 1
    """
    rows, length = document.shape
    at = torch.arange(length, device=document.device)
    row = torch.arange(rows, device=document.device)[:, None, None]
    return pair_rule(document, two_way_image)(row, at[:, None], at)
