"""The corpus of a run: its sources with their indexed shards, and how far they reach."""

import hashlib
import math
from dataclasses import dataclass, replace
from glob import glob

from data import container, masking, mixture
from data.cache import Cache
from data.container import SUFFIXES, is_shard
from data.mixture import Stage
from data.order import BLOCK_SHARDS
from data.source import Shards, Source
from data.store import Store, is_url
from data.tokenizer import Tokenizer
from nmm.config import (
    AugmentConfig,
    DataConfig,
    ImageConfig,
    SourceConfig,
    UnitModality,
)
from nmm.errors import UserError


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
        tokenizer = Tokenizer(config.tokenizer, units=config.units, sentinels=config.masking.ids)
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
            if config.masking.mean_spans:
                _check_room_for_spans(shards, key=key, config=config)
            for number in range(len(shards)):
                digest.update(shards.totals.digest_of(number).encode())
            sources.append(
                _source(name, source, shards, split=split, masks=config.masking.mean_spans > 0)
            )
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

    def alone(self, number: int) -> "Corpus":
        """One source, read without a cap, as if there were no other: rows that depend on it alone.

        The fingerprint stays that of all.
        """
        source = replace(self.sources[number], max_epochs=None)
        return replace(self, sources=[source], stages=[Stage(0, [source.weight])])

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


def _check_room_for_spans(shards: Shards, *, key: str, config: DataConfig) -> None:
    """Refuse images that are as long as the pieces which leave room for spans."""
    codes = shards.layout.modality is UnitModality.image
    longest = int(shards.totals.longest_units.max()) if codes else 0
    if shards.totals.images.any():
        longest = max(longest, shards.image)
    room = config.context_tokens - 2 - config.context_tokens // masking.PIECE_SHARE
    if longest > room:
        raise UserError(
            f"{key} holds an image of {longest} tokens and data.masking.mean_spans is "
            f"{config.masking.mean_spans:g}, for which long documents leave "
            f"1/{masking.PIECE_SHARE} of data.context_tokens={config.context_tokens} free; raise "
            f"data.context_tokens, or set data.masking.mean_spans=0."
        )


def _source(name: str, source: SourceConfig, shards: Shards, *, split: str, masks: bool) -> Source:
    """A source; nothing of the held-out split is drawn, so that no loss depends on a seed."""
    totals = shards.totals
    longest = int(totals.longest.max())
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
        longest=masking.longest(longest) if masks else longest,
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
