"""The totals of all shards of a folder in one file, so that a corpus of a million opens at once.

index.totals repeats the first lines of the indexes beside it; the index tool writes it at its end.
A row that does not fit its shard, or the size of its index, is not used: the index is opened then.
"""

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import columns, index
from data.store import Store, is_url, name_of
from data.tokenizer import Tokenizer
from data.totals import Totals
from nmm.config import Layout

FORMAT = 1
# Of every shard, as in data/totals.py.
TOTALS = (
    "documents",
    "text_tokens",
    "images",
    "skipped_images",
    "unit_tokens",
    "longest_units",
    "largest_unit",
    "token_bytes",
)
COUNTS = ("shard_bytes", "index_bytes", *TOTALS)
PER_SHARD = ("name", "group", "digest", *COUNTS)
LONGEST = ("longest_images", "longest_others")

Columns = dict[str, np.ndarray]
Group = list[int | str | None]


@dataclass(frozen=True)
class ShardTotals:
    """What the first lines of N indexes say.

    longest   int64[N]  tokens of the longest document in a row
    digest    V32[N]    32 bytes each
    others    int64[N]  as in data/totals.py
    """

    documents: np.ndarray
    text_tokens: np.ndarray
    images: np.ndarray
    skipped_images: np.ndarray
    unit_tokens: np.ndarray
    longest_units: np.ndarray
    largest_unit: np.ndarray
    token_bytes: np.ndarray
    longest: np.ndarray
    digest: np.ndarray

    @staticmethod
    def empty(count: int) -> "ShardTotals":
        sums = {name: np.zeros(count, np.int64) for name in (*TOTALS, "longest")}
        return ShardTotals(**sums, digest=np.zeros(count, "V32"))

    def put(self, number: int, totals: Totals, *, image_tokens: int) -> None:
        """What the index of one shard says."""
        for name in TOTALS:
            vars(self)[name][number] = vars(totals)[name]
        self.longest[number] = totals.longest_tokens(image_tokens)
        self.digest[number] = np.void(bytes.fromhex(totals.digest))

    def tokens(self, image_tokens: int) -> int:
        """Tokens of all documents in rows: text, images, units, begins and ends."""
        others = self.text_tokens + self.unit_tokens + 2 * self.documents
        return int((others + image_tokens * self.images).sum())

    def digest_of(self, number: int) -> str:
        """In hexadecimal digits."""
        return self.digest[number].tobytes().hex()


def read(
    shards: list[str],
    sizes: list[int],
    *,
    layout: Layout,
    tokenizer: Tokenizer,
    image_tokens: int,
    store: Store,
) -> ShardTotals:
    """The totals of shards of these sizes; raises UserError as `index.read_totals` does."""
    found = ShardTotals.empty(len(shards))
    is_known = np.zeros(len(shards), bool)
    for numbers in _by_folder(shards):
        table = Table.load(store.find_totals(shards[numbers[0]]))
        if table is None:
            continue
        here = np.array(numbers)
        names = _names([name_of(shards[number]) for number in numbers])
        bytes_of = np.array([sizes[number] for number in numbers], np.int64)
        rows = table.find(names, bytes_of, group=_group(layout, tokenizer.hash))
        here, rows = here[rows >= 0], rows[rows >= 0]
        wanted = table.columns["index_bytes"][rows].tolist()
        fits = [
            _index_bytes(shards[number], store=store) in (size, None)
            for number, size in zip(here.tolist(), wanted, strict=True)
        ]
        table.copy(rows[fits], found, at=here[fits], image_tokens=image_tokens)
        is_known[here[fits]] = True
    unknown = np.flatnonzero(~is_known).tolist()
    store.find_indexes([shards[number] for number in unknown])
    for number in unknown:
        totals = index.read_totals(
            shards[number],
            layout=layout,
            tokenizer=tokenizer,
            store=store,
            shard_bytes=sizes[number],
        )
        found.put(number, totals, image_tokens=image_tokens)
    return found


class Rows:
    """New rows of one folder, held as columns: a million take 200 MB."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.digests = bytearray()
        self.counts = {name: array("q") for name in COUNTS}
        self.longest = {name: array("i") for name in LONGEST}
        self.border = array("q", [0])

    def add(self, name: str, totals: Totals, *, shard_bytes: int, index_bytes: int) -> None:
        self.names.append(name)
        self.digests += bytes.fromhex(totals.digest)
        values = {**vars(totals), "shard_bytes": shard_bytes, "index_bytes": index_bytes}
        for count in COUNTS:
            self.counts[count].append(values[count])
        for images, others in totals.longest:
            self.longest["longest_images"].append(images)
            self.longest["longest_others"].append(others)
        self.border.append(len(self.longest["longest_images"]))

    def columns(self, *, group: int) -> Columns:
        return {
            "name": _names(self.names),
            "group": np.full(len(self.names), group, np.int32),
            "digest": np.frombuffer(bytes(self.digests), "V32"),
            "border": np.array(self.border, np.int64),
            **{name: np.array(values, np.int64) for name, values in self.counts.items()},
            **{name: np.array(values, np.int32) for name, values in self.longest.items()},
        }


def write(path: Path, rows: Rows, *, layout: Layout, tokenizer: Tokenizer) -> None:
    """Write the file of a folder; rows of other shards that are there stay."""
    group = _group(layout, tokenizer.hash)
    old = Table.load(path)
    groups = [*old.groups] if old else []
    groups += [] if group in groups else [group]
    new = rows.columns(group=groups.index(group))
    if old:
        stays = np.flatnonzero(~np.isin(old.columns["name"], new["name"]))
        new = _join(_select(old.columns, stays), new)
    new = _select(new, np.argsort(new["name"], kind="stable"))
    columns.write(path, values={"format": FORMAT, "groups": groups}, arrays=new)


@dataclass(frozen=True)
class Table:
    """The rows of a folder, sorted by name; `groups` tells what indexes were made with."""

    groups: list[Group]
    columns: Columns

    @staticmethod
    def load(path: Path) -> "Table | None":
        """The file, mapped into memory; None if there is none that we can read."""
        try:
            head, found = columns.read(path, names=(*PER_SHARD, *LONGEST, "border"))
        except (OSError, ValueError):
            return None
        rows = {len(found[name]) for name in PER_SHARD}
        if not isinstance(head.get("groups"), list) or rows != {len(found["border"]) - 1}:
            return None
        return Table(head["groups"], found) if head.get("format") == FORMAT else None

    def find(self, names: np.ndarray, sizes: np.ndarray, *, group: Group) -> np.ndarray:
        """int64[len(names)]: the row of every shard of that name, size and group, else -1."""
        own = self.columns
        if group not in self.groups or not len(own["name"]):
            return np.full(len(names), -1)
        row = np.minimum(np.searchsorted(own["name"], names), len(own["name"]) - 1)
        fits = own["name"][row] == names
        fits &= own["shard_bytes"][row] == sizes
        fits &= own["group"][row] == self.groups.index(group)
        return np.where(fits, row, -1)

    def copy(self, rows: np.ndarray, to: ShardTotals, *, at: np.ndarray, image_tokens: int) -> None:
        """The rows as the totals of the shards `at`."""
        chosen = _select(self.columns, rows)
        for name in (*TOTALS, "digest"):
            vars(to)[name][at] = chosen[name]
        if len(rows):
            tokens = 2 + chosen["longest_others"].astype(np.int64)
            tokens += image_tokens * chosen["longest_images"].astype(np.int64)
            to.longest[at] = np.maximum.reduceat(tokens, chosen["border"][:-1])


def _group(layout: Layout, tokenizer_hash: str) -> Group:
    modality = layout.modality.value if layout.modality else None
    return [index.FORMAT, layout.kind.value, layout.text_field, modality, tokenizer_hash]


def _by_folder(shards: Sequence[str]) -> list[list[int]]:
    folders: dict[str, list[int]] = {}
    for number, shard in enumerate(shards):
        folders.setdefault(shard.rpartition("/")[0], []).append(number)
    return list(folders.values())


def _names(names: Sequence[str]) -> np.ndarray:
    return np.array([name.encode("utf-8", "surrogateescape") for name in names], "S")


def _index_bytes(shard: str, *, store: Store) -> int | None:
    """Bytes of a shard's index; None for one that is still at a URL, -1 for one that is gone."""
    path = store.index_path(shard) if is_url(shard) else f"{shard}.index"  # a Path takes 8 us
    try:
        return os.stat(path).st_size
    except OSError:
        return None if is_url(shard) else -1


def _select(arrays: Columns, rows: np.ndarray) -> Columns:
    """Some rows of a table, with their pairs."""
    sizes = np.diff(arrays["border"])[rows]
    border = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    pairs = np.arange(border[-1]) + np.repeat(arrays["border"][rows] - border[:-1], sizes)
    chosen = {name: arrays[name][rows] for name in PER_SHARD}
    return {**chosen, **{name: arrays[name][pairs] for name in LONGEST}, "border": border}


def _join(first: Columns, second: Columns) -> Columns:
    border = np.concatenate([first["border"], first["border"][-1] + second["border"][1:]])
    names = (*PER_SHARD, *LONGEST)
    return {**{n: np.concatenate([first[n], second[n]]) for n in names}, "border": border}
