"""One source of a corpus: its shards, of which totals are held, and a few that are open."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from data import folder, ids, index
from data.ids import StoredIds
from data.index import ShardIndex
from data.order import BLOCK_SHARDS
from data.store import Store, is_url, name_of
from data.tokenizer import Tokenizer
from nmm.config import Kind, Layout
from nmm.errors import UserError

OPEN_SHARDS = 2 * BLOCK_SHARDS + 4


@dataclass(frozen=True)
class Shard:
    """`path` is a path or a URL, read through `store`."""

    path: str
    store: Store
    index: ShardIndex
    lengths: np.ndarray
    """int32[N]: tokens of every document in a row."""
    ids: StoredIds | None
    """Where its token ids are stored, if they are."""

    @property
    def name(self) -> str:
        return name_of(self.path)


class Shards(Sequence[Shard]):
    """The shards of a source, of which only totals are held.

    An index is opened when its shard is asked for; the last OPEN_SHARDS stay open, which is all
    that the rows of a window need.
    """

    def __init__(
        self, paths: list[str], *, layout: Layout, tokenizer: Tokenizer, image: int, store: Store
    ) -> None:
        """Check every index by its first line; `image` are the tokens of one. Raises UserError."""
        self.paths, self.store = paths, store
        self.layout, self.tokenizer, self.image = layout, tokenizer, image
        self.sizes = store.sizes(paths)
        self.totals = folder.read(
            paths, self.sizes, layout=layout, tokenizer=tokenizer, image_tokens=image, store=store
        )
        self.token_bytes = self.totals.token_bytes.tolist()
        self.token_paths = ids.find(paths, self.token_bytes, store=store, remedy=self._remedy)
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = self._open.pop(number, None) or self._load(number)
        self._open[number] = shard
        if len(self._open) > OPEN_SHARDS:
            del self._open[next(iter(self._open))]
        return shard

    def _load(self, number: int) -> Shard:
        path = self.paths[number]
        loaded = index.load(
            path,
            layout=self.layout,
            tokenizer=self.tokenizer,
            store=self.store,
            shard_bytes=self.sizes[number] if is_url(path) else None,
        )
        found = (loaded.digest, len(loaded), loaded.totals.token_bytes)
        told = (self.totals.digest_of(number), int(self.totals.documents[number]))
        if found != (*told, self.token_bytes[number]):
            raise UserError(
                f"{path} was indexed again with another result; start the run again, and if that "
                f"does not help, delete {self.store.find_totals(path)}."
            )
        tokens = self.token_paths[number]
        stored = StoredIds.of(tokens, loaded, self.tokenizer.ids) if tokens else None
        return Shard(path, self.store, loaded, loaded.lengths(self.image), stored)

    def _remedy(self, shard: str) -> str:
        return index.remedy(
            shard,
            layout=self.layout,
            tokenizer=self.tokenizer,
            store=self.store,
            store_tokens=True,
        )

    def url_sizes(self) -> list[int]:
        """Bytes that are read of each shard that is a URL: of the shard, of its stored ids."""
        files = zip(self.paths, self.sizes, self.token_paths, self.token_bytes, strict=True)
        only_ids = self.layout.kind is Kind.text
        read = [
            (0 if tokens and only_ids else size) + (token_bytes if is_url(tokens) else 0)
            for path, size, tokens, token_bytes in files
            if is_url(path)
        ]
        return sorted(read)

    def __getstate__(self) -> dict:
        """Another process opens its own indexes."""
        return {**self.__dict__, "_open": {}}


@dataclass(frozen=True)
class Source:
    """One corpus of one kind; `weight` is its share of tokens. Sums are over all of its shards.

    max_epochs   how often its documents may be read; None: data.repeat decides
    tokens       in rows: text, image positions, begins and ends
    longest      tokens of the longest document
    text_first_fraction   share of its documents whose text comes before the image in an epoch
    """

    name: str
    layout: Layout
    weight: float
    max_epochs: float | None
    shards: Sequence[Shard]
    paths: list[str]
    documents_of_shards: np.ndarray
    text_tokens: int
    images: int
    skipped_images: int
    unit_tokens: int
    tokens: int
    longest: int
    text_first_fraction: float

    @property
    def kind(self) -> Kind:
        return self.layout.kind

    @property
    def documents(self) -> int:
        return int(self.documents_of_shards.sum())

    def epochs(self, *, repeat: bool) -> float | None:
        """How often its documents may be read; None: without end."""
        if self.max_epochs is not None:
            return self.max_epochs
        return None if repeat else 1.0

    def supply_tokens(self, *, repeat: bool) -> float:
        """Tokens that it gives for certain: a stream takes or leaves whole documents."""
        epochs = self.epochs(repeat=repeat)
        if epochs is None:
            return math.inf
        return min(epochs * self.tokens, math.ceil(epochs) * self.tokens - self.longest / 2)
