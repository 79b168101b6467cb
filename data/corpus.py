"""The corpus of a run: its sources with their indexed shards, and how far they reach."""

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import index
from data.index import ShardIndex
from data.tokenizer import Tokenizer
from nmm.config import DataConfig, ImageConfig, Kind, SourceConfig
from nmm.errors import UserError


@dataclass(frozen=True)
class Shard:
    path: Path
    index: ShardIndex
    lengths: np.ndarray
    """int32[N]: tokens of every document in a row."""


@dataclass(frozen=True)
class Source:
    """One corpus of one kind; `weight` is its share of tokens. Sums are over all of its shards."""

    name: str
    kind: Kind
    weight: float
    shards: list[Shard]

    @property
    def documents(self) -> int:
        return sum(len(shard.index) for shard in self.shards)

    @property
    def text_tokens(self) -> int:
        return sum(shard.index.text_tokens for shard in self.shards)

    @property
    def images(self) -> int:
        return sum(shard.index.images for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in rows: text, image positions, begins and ends."""
        return sum(int(shard.lengths.sum(dtype=np.int64)) for shard in self.shards)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(int(shard.lengths.max()) for shard in self.shards)


@dataclass(frozen=True)
class Corpus:
    """All sources of one split in the order of data.sources.

    `fingerprint` changes with any byte that is read, and not with where the shards lie.
    """

    sources: list[Source]
    tokenizer: Tokenizer
    image: ImageConfig
    fingerprint: str

    @staticmethod
    def open(config: DataConfig, *, image: ImageConfig, vocab_size: int, split: str) -> "Corpus":
        """Load the indexes of all shards of `split`, "train" or "held_out"; raises UserError."""
        tokenizer = Tokenizer(config.tokenizer)
        tokenizer.check_capacity(vocab_size)
        sources = [
            _open_source(name, source, tokenizer=tokenizer, image=image, split=split)
            for name, source in config.sources.items()
        ]
        return Corpus(sources, tokenizer, image, _fingerprint(sources, tokenizer))

    def supply_tokens(self) -> int:
        """Tokens that the stream serves for certain before a source would have to repeat.

        The stream ends in virtual time where the first source does, and it takes or leaves whole
        documents: the halves of the longest ones are not counted.
        """
        end = min((source.tokens - source.longest / 2) / source.weight for source in self.sources)
        served = (
            min(source.tokens, source.weight * end - source.longest / 2) for source in self.sources
        )
        return sum(int(max(0, tokens)) for tokens in served)

    def check_budget(self, tokens: int, *, repeat: bool) -> None:
        """Refuse a budget that would repeat documents, unless data.repeat says so."""
        supply = self.supply_tokens()
        if tokens > supply and not repeat:
            raise UserError(
                f"the schedule needs {tokens:,} tokens but the corpus serves {supply:,} before "
                f"its first source ends; lower schedule.total_tokens, add shards, or set "
                f"data.repeat=true."
            )


def _open_source(
    name: str, source: SourceConfig, *, tokenizer: Tokenizer, image: ImageConfig, split: str
) -> Source:
    assert split in ("train", "held_out"), split
    pattern = source.train if split == "train" else source.held_out
    shards = []
    for path in find_shards(pattern, key=f"data.sources.{name}.{split}"):
        loaded = index.load(path, kind=source.kind, tokenizer=tokenizer)
        shards.append(Shard(path, loaded, loaded.lengths(image.tokens)))
    return Source(name, source.kind, source.weight, shards)


def find_shards(pattern: str, *, key: str) -> list[Path]:
    """The .tar files of a glob, sorted; raises UserError, which names the `key`, without any."""
    paths = sorted(Path(path) for path in glob.glob(pattern) if path.endswith(".tar"))
    if paths:
        return paths
    directory = Path(pattern).parent
    if not glob.glob(str(directory)):
        raise UserError(
            f"{key} is {pattern}, but the directory {directory} does not exist; correct the path, "
            f"or make the demo corpus with `python -m data.prepare.demo`."
        )
    raise UserError(f"{key} is {pattern}, which matches no .tar file; correct the pattern.")


def _fingerprint(sources: list[Source], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.hash.encode())
    for source in sources:
        digest.update(f"\n{source.name}\n{source.kind.value}\n".encode())
        for shard in source.shards:
            digest.update(shard.index.digest.encode())
    return digest.hexdigest()
