"""Where the tokens come from, in which shares, and how they are packed into rows."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from nmm.config.check import at_least, fraction, positive
from nmm.errors import UserError

MAX_SOURCES = 255  # PackedBatch.source is a byte


class Kind(Enum):
    """The layout of a shard's samples (docs/data-format.md)."""

    caption = "caption"
    interleaved = "interleaved"
    text = "text"


@dataclass
class SourceConfig:
    """One corpus: `train` and `held_out` are globs of .tar shards, `weight` its share of tokens."""

    kind: Kind = MISSING
    train: str = MISSING
    held_out: str = MISSING
    weight: float = MISSING


@dataclass
class DataConfig:
    """Rows of `row_tokens` tokens hold documents of at most `context_tokens`, packed best-fit.

    A step consumes `global_rows` rows, whatever the number of processes; `window_documents`
    documents are packed at a time, in an order drawn from `seed`. `tokenizer` is the path of a
    sentencepiece model. `repeat` allows more than one epoch. `workers` processes read and decode
    for each training process. A run stops when more than `max_bad_fraction` of its documents turn
    out to be unreadable.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: str = MISSING
    context_tokens: int = 1024
    row_tokens: int = 4096
    global_rows: int = 512
    window_documents: int = 4096
    seed: int = 0
    repeat: bool = False
    workers: int = 2
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        positive(data__context_tokens=self.context_tokens, data__row_tokens=self.row_tokens)
        positive(data__global_rows=self.global_rows, data__window_documents=self.window_documents)
        at_least(0, data__workers=self.workers, data__seed=self.seed)
        fraction(data__max_bad_fraction=self.max_bad_fraction)
        for name, source in self.sources.items():
            positive(**{f"data__sources__{name}__weight": source.weight})
        if len(self.sources) > MAX_SOURCES:
            raise UserError(
                f"data.sources has {len(self.sources)} entries; join some, to have {MAX_SOURCES} "
                f"at most."
            )
        if self.seed >= 2**63:
            raise UserError(f"data.seed is {self.seed}; set it below 2**63.")
        if self.row_tokens % self.context_tokens:
            raise UserError(
                f"data.row_tokens is {self.row_tokens} and data.context_tokens is "
                f"{self.context_tokens}; make the row a multiple of the context."
            )
