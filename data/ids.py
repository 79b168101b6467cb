"""Token ids stored beside a shard, so that training need not tokenise again.

SHARD.tokens holds the text ids of all documents of the shard's index, one after the other, as
little-endian uint16, or uint32 for a model of more than 65,536 pieces. The index says how many
bytes these are, how many ids a document has, and their checksum.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data import container
from data.index import ShardIndex
from data.sequences import Texts
from data.store import Store
from data.tokenizer import IdTable
from data.units import Units
from nmm.errors import UserError


def type_of(ids: IdTable) -> np.dtype:
    """The smallest type that holds every id of a text."""
    return np.dtype("<u2" if ids.text_end <= 1 << 16 else "<u4")


def to_bytes(texts: Texts, kind: np.dtype) -> bytes:
    """The part of a document in the file."""
    found = (text for text in texts if not (text is None or isinstance(text, Units)))
    return b"".join(np.array(text, kind).tobytes() for text in found)


def find(
    shards: list[str],
    token_bytes: list[int],
    *,
    store: Store,
    remedy: Callable[[str], str],
) -> list[str]:
    """The file of every shard whose index says `token_bytes` above 0, else ""; raises UserError."""
    paths = [
        store.tokens_path(shard) if size else ""
        for shard, size in zip(shards, token_bytes, strict=True)
    ]
    sizes = dict(zip(filter(None, paths), _sizes(paths, store=store), strict=True))
    for shard, path, wanted in zip(shards, paths, token_bytes, strict=True):
        if path and sizes[path] != wanted:
            raise UserError(
                f"{path} is stale: it has {sizes[path]} bytes, the index of its shard says "
                f"{wanted}; {remedy(shard)}"
            )
    return paths


def _sizes(paths: list[str], *, store: Store) -> list[int]:
    found = [path for path in paths if path]
    try:
        return store.sizes(found)
    except UserError as error:
        raise UserError(
            f"{str(error).rstrip('.')}, or index its shard again, with --store-tokens or without: "
            f"the index says that its token ids are there."
        ) from None


@dataclass(frozen=True)
class StoredIds:
    """The file of one shard, at a path or a URL.

    border  int64[N+1]  document i has the ids [border[i], border[i+1])
    """

    path: str
    kind: np.dtype
    border: np.ndarray

    @staticmethod
    def of(path: str, index: ShardIndex, ids: IdTable) -> "StoredIds":
        border = np.concatenate([[0], np.cumsum(index.text_counts, dtype=np.int64)])
        return StoredIds(path, type_of(ids), border)

    def texts(self, document: int, *, index: ShardIndex, store: Store) -> Texts:
        """The texts of a document, None for what is no text; raises UserError."""
        start, stop = (int(self.border[document + end]) * self.kind.itemsize for end in (0, 1))
        crc = int(index.token_crc[document])
        raw = container.checked_bytes(self.path, start=start, stop=stop, crc=crc, store=store)
        ids, at, texts = np.frombuffer(raw, self.kind), 0, []
        for size in index.segments(document).tolist():
            texts.append(None if size < 0 else ids[at : at + size])
            at += max(size, 0)
        return texts
