"""What indexing came to: sums over all shards, and the samples that were left out, by reason."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from data.totals import Totals
from nmm.errors import UserError


@dataclass(frozen=True)
class Indexed:
    """What the index of a shard says; `dropped` are (reason, key) of all that it leaves out."""

    shard: str
    shard_bytes: int
    index_bytes: int
    totals: Totals
    dropped: list[tuple[str, str]]


@dataclass(frozen=True)
class Failed:
    """A shard that has no index, and why."""

    shard: str
    error: UserError


@dataclass
class Summary:
    """All indexed shards together, however many; `examples` are the first keys of every reason."""

    shards: int = 0
    documents: int = 0
    text_tokens: int = 0
    unit_tokens: int = 0
    images: int = 0
    skipped_images: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    failed: list[Failed] = field(default_factory=list)

    def add(self, result: Indexed | Failed) -> None:
        if isinstance(result, Failed):
            self.failed.append(result)
            return
        totals = result.totals
        self.shards += 1
        self.documents += totals.documents
        self.text_tokens += totals.text_tokens
        self.unit_tokens += totals.unit_tokens
        self.images += totals.images
        self.skipped_images += totals.skipped_images
        for reason, key in result.dropped:
            self.dropped[reason] += 1
            self.examples.setdefault(reason, key)

    def table(self) -> str:
        """What the shards hold, and what was dropped by reason, with one example each."""
        rows = [
            ("shards", self.shards, ""),
            ("documents", self.documents, ""),
            ("text tokens", self.text_tokens, ""),
            ("unit tokens", self.unit_tokens, ""),
            ("images", self.images, ""),
            ("skipped images", self.skipped_images, ""),
            ("dropped", self.dropped.total(), ""),
            *(
                (f"  {reason}", count, f"first: {self.examples[reason]}")
                for reason, count in self.dropped.most_common()
            ),
        ]
        return "\n".join(f"{name:<22}{count:>16,}  {note}".rstrip() for name, count, note in rows)

    def refuse_failed(self) -> None:
        """Raise a UserError if a shard has no index."""
        if self.failed:
            total = self.shards + len(self.failed)
            others = (
                f" ({len(self.failed)} of {total} shards cannot be indexed; this is the first.)"
                if total > 1
                else ""
            )
            raise UserError(f"{self.failed[0].error}{others}")


def quarantined(result: Indexed | Failed) -> Iterator[bytes]:
    """A line of JSON for every sample that is left out, and one for a shard without an index."""
    found = (
        [("no_index", "", str(result.error))]
        if isinstance(result, Failed)
        else [(reason, key, "") for reason, key in result.dropped]
    )
    for reason, key, detail in found:
        line = {"shard": result.shard, "key": key, "reason": reason, "detail": detail}
        yield json.dumps(line).encode() + b"\n"
