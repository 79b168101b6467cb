"""The corpus of a run: its sources with their indexed shards, and how far they reach."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from typing import overload

import numpy as np

from data import container, folder, ids, index, mixture
from data.cache import Cache
from data.container import SUFFIXES, is_shard
from data.ids import StoredIds
from data.index import ShardIndex
from data.mixture import Stage
from data.order import BLOCK_SHARDS
from data.store import Store, is_url, name_of
from data.tokenizer import Tokenizer
from nmm.config import (
    AugmentConfig,
    DataConfig,
    ImageConfig,
    Kind,
    Layout,
    SourceConfig,
    UnitModality,
)
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
        told = (self.totals.digest_of(number), int(self.totals.documents[number]))
        if (loaded.digest, len(loaded)) != told:
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


@dataclass(frozen=True)
class Corpus:
    """All sources of one split in the order of data.sources.

    `fingerprint` changes with any byte that is read, and not with where the shards lie. `augment`
    says how its images vary. `stages` are the weights along the rows, of `row_tokens` tokens.
    """

    sources: list[Source]
    tokenizer: Tokenizer
    image: ImageConfig
    augment: AugmentConfig
    fingerprint: str
    stages: list[Stage]
    row_tokens: int

    @staticmethod
    def open(config: DataConfig, *, image: ImageConfig, vocab_size: int, split: str) -> "Corpus":
        """Check the indexes of all shards of `split`, "train" or "held_out"; raises UserError.

        Sources without held-out shards are no part of that split.
        """
        assert split in ("train", "held_out"), split
        tokenizer = Tokenizer(config.tokenizer, units=config.units)
        tokenizer.check_capacity(vocab_size)
        store = Store.of(config)
        digest = hashlib.sha256(tokenizer.hash.encode())
        sources, sizes = [], []
        for name, source in config.sources.items():
            pattern = source.train if split == "train" else source.held_out
            if pattern is None:
                continue
            key = f"data.sources.{name}.{split}"
            shards = _open_shards(
                pattern, key=key, source=source, tokenizer=tokenizer, image=image, store=store
            )
            sizes.append(shards.url_sizes())
            digest.update(f"\n{name}\n{source.kind.value}\n".encode())
            if source.text_field is not None:
                digest.update(f"{source.text_field}\n".encode())
            if source.modality is not None:
                digest.update(f"{source.modality.value}\n".encode())
                _check_units(shards, key=key, modality=source.modality, config=config)
            for number in range(len(shards)):
                digest.update(shards.totals.digest_of(number).encode())
            sources.append(_source(name, source, shards, split=split))
        if store.cache:
            _check_cache(sizes, cache=store.cache)
        return Corpus(
            sources,
            tokenizer,
            image,
            config.augment if split == "train" else AugmentConfig(),
            digest.hexdigest(),
            mixture.stages(config),
            config.row_tokens,
        )

    def supply_tokens(self, *, repeat: bool = False) -> float:
        """Tokens that the stream serves for certain before a source ends; inf without an end.

        The stream ends where the first source does; halves of the longest documents do not count.
        """
        supplies = [source.supply_tokens(repeat=repeat) for source in self.sources]
        ends = [
            mixture.reach(self.stages, source=number, supply=supply, row_tokens=self.row_tokens)
            for number, supply in enumerate(supplies)
        ]
        if math.isinf(min(ends)):
            return math.inf
        asked = mixture.asked(self.stages, tokens=min(ends), row_tokens=self.row_tokens)
        served = (
            min(supply, tokens - source.longest / 2)
            for source, supply, tokens in zip(self.sources, supplies, asked, strict=True)
        )
        return sum(int(max(0, tokens)) for tokens in served)

    def check_budget(self, tokens: int, *, repeat: bool) -> None:
        """Refuse a budget that would repeat documents more often than allowed."""
        supply = self.supply_tokens(repeat=repeat)
        if tokens <= supply:
            return
        asked = mixture.asked(self.stages, tokens=tokens, row_tokens=self.row_tokens)
        number = min(
            range(len(asked)),
            key=lambda n: self.sources[n].supply_tokens(repeat=repeat) / max(asked[n], 1),
        )
        source = self.sources[number]
        asks = f"{source.name} is asked for {asked[number]:,.0f} tokens and has {source.tokens:,}"
        if source.max_epochs is not None:
            raise UserError(
                f"the schedule needs {tokens:,} tokens but the corpus serves {supply:,} before "
                f"its first source ends: {asks}, and data.sources.{source.name}.max_epochs is "
                f"{source.max_epochs:g}; raise it, lower schedule.total_tokens or the weight, or "
                f"add shards."
            )
        raise UserError(
            f"the schedule needs {tokens:,} tokens but the corpus serves {supply:,} before "
            f"its first source ends: {asks}; lower schedule.total_tokens, add shards, or set "
            f"data.repeat=true."
        )


def _open_shards(
    pattern: str,
    *,
    key: str,
    source: SourceConfig,
    tokenizer: Tokenizer,
    image: ImageConfig,
    store: Store,
) -> Shards:
    paths = find_shards(pattern, key=key, store=store)
    for path in paths:
        container.check(path, source.layout)
    shards = Shards(
        paths, layout=source.layout, tokenizer=tokenizer, image=image.tokens, store=store
    )
    if not shards.totals.documents.sum():
        raise UserError(
            f"{key} is {pattern}, whose shards hold no usable document, so its weight of "
            f"{source.weight:g} can never be served; correct it, or remove the source."
        )
    return shards


def _check_units(shards: Shards, *, key: str, modality: UnitModality, config: DataConfig) -> None:
    """Refuse units without an id, and images of more codes than the context."""
    largest = int(shards.totals.largest_unit.max())
    longest = int(shards.totals.longest_units.max())
    if largest >= config.units[modality]:
        raise UserError(
            f"{key} holds the {modality.value} unit {largest}, but data.units.{modality.value} is "
            f"{config.units[modality]}; set it to {largest + 1} or more."
        )
    if modality is UnitModality.image and longest > config.context_tokens - 2:
        raise UserError(
            f"{key} holds an image of {longest} tokens, which are never cut, but "
            f"data.context_tokens is {config.context_tokens}; set it to {longest + 2} or more."
        )


def _source(name: str, source: SourceConfig, shards: Shards, *, split: str) -> Source:
    """A source; nothing of the held-out split is drawn, so that no loss depends on a seed."""
    totals = shards.totals
    return Source(
        name=name,
        layout=source.layout,
        weight=source.weight,
        max_epochs=source.max_epochs,
        shards=shards,
        paths=shards.paths,
        documents_of_shards=totals.documents,
        text_tokens=int(totals.text_tokens.sum()),
        images=int(totals.images.sum()),
        skipped_images=int(totals.skipped_images.sum()),
        unit_tokens=int(totals.unit_tokens.sum()),
        tokens=totals.tokens(shards.image),
        longest=int(totals.longest.max()),
        text_first_fraction=source.text_first_fraction if split == "train" else 0.0,
    )


def _check_cache(sizes: list[list[int]], *, cache: Cache) -> None:
    """Refuse a cache that cannot hold what one window reads: it would never hit.

    A window reads the block of shards that the order mixes, and at its end also the next block.
    `sizes` are those of the URLs of every source, the largest last.
    """
    if any(sizes):
        at_once = sum(sum(of_source[-2 * BLOCK_SHARDS :]) for of_source in sizes)
        cache.check(sum(map(sum, sizes)), at_once_bytes=at_once)


def find_shards(pattern: str, *, key: str, store: Store) -> list[str]:
    """The shards of a pattern, sorted; raises UserError, which names the `key`, without any."""
    paths = list(filter(is_shard, store.expand(pattern, key=key)))
    indexed = (
        set() if is_url(pattern) else {i.removesuffix(".index") for i in glob(f"{pattern}.index")}
    )
    if gone := sorted(indexed - set(paths)):
        raise UserError(
            f"{key} is {pattern}, but {gone[0]} is gone while its index is there; bring it back, "
            f"or delete {gone[0]}.index."
        )
    if paths:
        return paths
    directory = pattern.rpartition("/")[0] or "."
    if not is_url(pattern) and "{" not in directory and not glob(directory):
        raise UserError(
            f"{key} is {pattern}, but the directory {directory} does not exist; correct the path, "
            f"or make the demo corpus with `python -m data.prepare.demo`."
        )
    raise UserError(
        f"{key} is {pattern}, which matches no shard; correct the pattern "
        f"(shards are {', '.join(SUFFIXES)} files)."
    )
