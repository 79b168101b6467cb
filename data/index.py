"""The index beside a shard: every document's place, checksum and exact token counts."""

import hashlib
import json
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data import columns, documents, images, tar
from data.documents import BadSample
from data.store import LOCAL, Store, is_url
from data.tokenizer import Tokenizer
from data.totals import Totals
from nmm.config import Kind
from nmm.errors import UserError

FORMAT = 2


@dataclass(frozen=True)
class ShardIndex:
    """N usable documents of one shard, in the shard's order. X.tar has its index in X.tar.index.

    start, stop  int64[N]    bytes [start, stop) of the shard, from the first header of the document
    crc          uint32[N]   crc32 of these bytes
    text_counts  int32[N]    text tokens of every document
    image_counts int32[N]    images of every document
    segment      int32[S]    of all documents: tokens of a text, or documents.IMAGE_SEGMENT
    border       int64[N+1]  document i has segments [border[i], border[i+1])
    key_bytes    uint8[K]    keys as UTF-8; document i has bytes [key_border[i], key_border[i+1])
    key_border   int64[N+1]
    dropped      (reason, key) of what the shard holds and nobody will read
    """

    kind: Kind
    tokenizer_hash: str
    shard_bytes: int
    totals: Totals
    dropped: list[tuple[str, str]]
    start: np.ndarray
    stop: np.ndarray
    crc: np.ndarray
    text_counts: np.ndarray
    image_counts: np.ndarray
    segment: np.ndarray
    border: np.ndarray
    key_bytes: np.ndarray
    key_border: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def key(self, document: int) -> str:
        return (
            self.key_bytes[self.key_border[document] : self.key_border[document + 1]]
            .tobytes()
            .decode()
        )

    def segments(self, document: int) -> np.ndarray:
        return self.segment[self.border[document] : self.border[document + 1]]

    def lengths(self, image_tokens: int) -> np.ndarray:
        """int32[N]: tokens of every document in a row, with begin, end and image positions."""
        return 2 + self.text_counts + image_tokens * self.image_counts

    @property
    def text_tokens(self) -> int:
        return self.totals.text_tokens

    @property
    def images(self) -> int:
        return self.totals.images

    @property
    def digest(self) -> str:
        return self.totals.digest

    def save(self, shard: Path | str, *, store: Store = LOCAL) -> None:
        """Write the file where `store` keeps it; it appears complete or not at all."""
        path = store.index_path(str(shard))
        head = {
            "format": FORMAT,
            "kind": self.kind.value,
            "tokenizer": self.tokenizer_hash,
            "shard_bytes": self.shard_bytes,
            **asdict(self.totals),
        }
        arrays = {name: vars(self)[name] for name in ARRAYS}
        dropped = np.frombuffer(json.dumps(self.dropped).encode(), np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns.write(path, values=head, arrays={**arrays, "dropped": dropped})


DIGESTED = ("start", "stop", "crc", "segment", "border", "key_bytes", "key_border")
ARRAYS = (*DIGESTED, "text_counts", "image_counts")


def index_shard(path: Path, *, kind: Kind, tokenizer: Tokenizer) -> ShardIndex:
    """Read a shard and count its documents; raises UserError when it holds none of this kind."""
    found = tar.scan(path)
    dropped: list[tuple[str, str]] = []
    usable: list[tuple[tar.Sample, int, np.ndarray]] = []
    with path.open("rb") as file:
        for sample in found.samples:
            file.seek(sample.start)
            raw = file.read(sample.stop - sample.start)
            try:
                usable.append(
                    (
                        sample,
                        zlib.crc32(raw),
                        _segments(sample, raw, kind=kind, tokenizer=tokenizer),
                    )
                )
            except BadSample as bad:
                dropped.append((bad.reason, sample.key))
    if found.damaged_at is not None:
        dropped.append(("unreadable_tail", f"byte {found.damaged_at}"))
    if not usable:
        raise UserError(_no_document(path, kind=kind, found=found, dropped=dropped))
    return _assemble(
        usable, kind=kind, tokenizer=tokenizer, shard_bytes=path.stat().st_size, dropped=dropped
    )


def read_totals(
    shard: Path | str,
    *,
    kind: Kind,
    tokenizer: Tokenizer,
    store: Store = LOCAL,
    shard_bytes: int | None = None,
) -> Totals:
    """The totals of a shard from the first line of its index; raises UserError like `load`.

    `shard_bytes` is the size of the shard, for who knows it already.
    """
    shard = str(shard)
    remedy = _remedy(shard, kind=kind, tokenizer=tokenizer, store=store)
    path = store.find_index(shard)
    shard_bytes = store.size(shard) if shard_bytes is None else shard_bytes
    try:
        head = columns.read_head(path).values
    except FileNotFoundError:
        if shard_bytes == 0:
            raise UserError(
                f"{shard} is empty (0 bytes); write the shard again, or delete it."
            ) from None
        raise UserError(f"{shard} has no index; {remedy}") from None
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged; {remedy}") from None
    for what, stored, value in (
        ("format", head.get("format"), FORMAT),
        ("kind", head.get("kind"), kind.value),
        ("shard size in bytes", head.get("shard_bytes"), shard_bytes),
        ("tokenizer", head.get("tokenizer"), tokenizer.hash),
    ):
        if stored != value:
            raise UserError(f"{path} is stale: its {what} is {stored}, now it is {value}; {remedy}")
    return Totals.from_head(head)


def load(
    shard: Path | str,
    *,
    kind: Kind,
    tokenizer: Tokenizer,
    store: Store = LOCAL,
    shard_bytes: int | None = None,
) -> ShardIndex:
    """The index of a shard, its arrays mapped into memory; `shard_bytes` as for `read_totals`.

    Raises UserError when it is missing, damaged, or belongs to something else.
    """
    totals = read_totals(
        shard, kind=kind, tokenizer=tokenizer, store=store, shard_bytes=shard_bytes
    )
    path = store.index_path(str(shard))
    try:
        head, arrays = columns.read(path)
        dropped = [(reason, key) for reason, key in json.loads(arrays.pop("dropped").tobytes())]
    except (OSError, ValueError):
        remedy = _remedy(str(shard), kind=kind, tokenizer=tokenizer, store=store)
        raise UserError(f"{path} is damaged; {remedy}") from None
    return ShardIndex(
        kind=kind,
        tokenizer_hash=tokenizer.hash,
        shard_bytes=head["shard_bytes"],
        totals=totals,
        dropped=dropped,
        **arrays,
    )


def join_segments(indexes: list[ShardIndex]) -> tuple[np.ndarray, np.ndarray]:
    """`segment` and `border` of the documents of all indexes, one after the other."""
    sizes = np.cumsum([0, *(len(each.segment) for each in indexes)])
    borders = [each.border[1:] + size for each, size in zip(indexes, sizes[:-1], strict=True)]
    segment = np.concatenate([each.segment for each in indexes])
    return segment, np.concatenate([[0], *borders])


def _remedy(shard: str, *, kind: Kind, tokenizer: Tokenizer, store: Store) -> str:
    place = f" --index-dir {store.index_dir}" if is_url(shard) else ""
    return (
        f"run `python -m data.prepare.index --kind {kind.value} --shards '{shard}' "
        f"--tokenizer {tokenizer.path}{place}`."
    )


def _segments(sample: tar.Sample, raw: bytes, *, kind: Kind, tokenizer: Tokenizer) -> np.ndarray:
    if sample.fault:
        raise BadSample(sample.fault)
    parts = documents.parse(kind, tar.members_of(raw))
    for part in parts:
        if isinstance(part, bytes):
            images.check_header(part)
    return documents.segments(parts, tokenizer)


def _assemble(
    usable: list[tuple[tar.Sample, int, np.ndarray]],
    *,
    kind: Kind,
    tokenizer: Tokenizer,
    shard_bytes: int,
    dropped: list[tuple[str, str]],
) -> ShardIndex:
    keys = [sample.key.encode() for sample, _, _ in usable]
    return assemble(
        kind=kind,
        tokenizer_hash=tokenizer.hash,
        shard_bytes=shard_bytes,
        dropped=dropped,
        start=np.array([sample.start for sample, _, _ in usable], np.int64),
        stop=np.array([sample.stop for sample, _, _ in usable], np.int64),
        crc=np.array([crc for _, crc, _ in usable], np.uint32),
        segment=np.concatenate([segments for _, _, segments in usable]),
        border=_borders([len(segments) for _, _, segments in usable]),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_border=_borders([len(key) for key in keys]),
    )


def assemble(
    *,
    kind: Kind,
    tokenizer_hash: str,
    shard_bytes: int,
    dropped: list[tuple[str, str]],
    segment: np.ndarray,
    border: np.ndarray,
    **places: np.ndarray,
) -> ShardIndex:
    """An index from its arrays; what can be counted from them is counted here."""
    arrays = {"segment": segment, "border": border, **places}
    digest = hashlib.sha256()
    for name in DIGESTED:
        digest.update(arrays[name].tobytes())
    owner = np.repeat(np.arange(len(border) - 1), np.diff(border))
    text = np.bincount(owner, np.maximum(segment, 0), minlength=len(border) - 1).astype(np.int32)
    images = np.bincount(owner[segment < 0], minlength=len(border) - 1).astype(np.int32)
    return ShardIndex(
        kind=kind,
        tokenizer_hash=tokenizer_hash,
        shard_bytes=shard_bytes,
        totals=Totals.count(text, images, digest=digest.hexdigest()),
        dropped=dropped,
        **arrays,
        text_counts=text,
        image_counts=images,
    )


def _borders(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _no_document(path: Path, *, kind: Kind, found: tar.Scan, dropped: list[tuple[str, str]]) -> str:
    extensions = ", ".join(f".{name}" for name, _ in found.extensions.most_common(8)) or "no files"
    reasons = ", ".join(
        f"{count} {reason}" for reason, count in Counter(r for r, _ in dropped).most_common()
    )
    return (
        f"{path} holds no document of kind {kind.value}: it has {extensions} ({reasons}); "
        f"see docs/data-format.md for what a {kind.value} shard holds."
    )
