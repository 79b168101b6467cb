"""The index beside a shard: every document's place, checksum and exact token counts."""

import hashlib
import json
import os
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import documents, images, tar
from data.documents import BadSample
from data.tokenizer import Tokenizer
from nmm.config import Kind
from nmm.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class ShardIndex:
    """N usable documents of one shard, in the shard's order. X.tar has its index in X.tar.index.

    start, stop  int64[N]    bytes [start, stop) of the shard, from the first header of the document
    crc          uint32[N]   crc32 of these bytes
    segment      int32[S]    of all documents: tokens of a text, or documents.IMAGE_SEGMENT
    border       int64[N+1]  document i has segments [border[i], border[i+1])
    key_bytes    uint8[K]    keys as UTF-8; document i has bytes [key_border[i], key_border[i+1])
    key_border   int64[N+1]
    dropped      (reason, key) of what the shard holds and nobody will read
    """

    kind: Kind
    tokenizer_hash: str
    shard_bytes: int
    dropped: list[tuple[str, str]]
    start: np.ndarray
    stop: np.ndarray
    crc: np.ndarray
    segment: np.ndarray
    border: np.ndarray
    key_bytes: np.ndarray
    key_border: np.ndarray
    digest: str

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
        tokens = documents.segment_tokens(self.segment, image_tokens)
        return 2 + np.add.reduceat(tokens, self.border[:-1], dtype=np.int32)

    @property
    def text_tokens(self) -> int:
        return int(self.segment[self.segment > 0].sum())

    @property
    def images(self) -> int:
        return int((self.segment < 0).sum())

    def save(self, shard: Path) -> None:
        """Write the file beside the shard; it appears complete or not at all."""
        head = {
            "format": FORMAT,
            "kind": self.kind.value,
            "tokenizer": self.tokenizer_hash,
            "shard_bytes": self.shard_bytes,
            "dropped": self.dropped,
            "digest": self.digest,
        }
        part = _index_path(shard).with_suffix(f".part{os.getpid()}")
        with part.open("wb") as file:
            np.savez(
                file,
                head=np.frombuffer(json.dumps(head).encode(), np.uint8),
                start=self.start,
                stop=self.stop,
                crc=self.crc,
                segment=self.segment,
                border=self.border,
                key_bytes=self.key_bytes,
                key_border=self.key_border,
            )
        part.replace(_index_path(shard))


ARRAYS = ("start", "stop", "crc", "segment", "border", "key_bytes", "key_border")


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


def load(shard: Path, *, kind: Kind, tokenizer: Tokenizer) -> ShardIndex:
    """The index of a shard; raises UserError when it is missing or belongs to something else."""
    remedy = (
        f"run `python -m data.prepare.index --kind {kind.value} --shards '{shard}' "
        f"--tokenizer {tokenizer.path}`."
    )
    path = _index_path(shard)
    shard_bytes = shard.stat().st_size
    if not path.exists():
        if shard_bytes == 0:
            raise UserError(f"{shard} is empty (0 bytes); write the shard again, or delete it.")
        raise UserError(f"{shard} has no index; {remedy}")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            head = json.loads(stored["head"].tobytes())
            arrays = {name: stored[name] for name in ARRAYS} if head["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path} is damaged; {remedy}") from None
    for what, stored_value, value in (
        ("format", head["format"], FORMAT),
        ("kind", head["kind"], kind.value),
        ("shard size in bytes", head["shard_bytes"], shard_bytes),
        ("tokenizer", head["tokenizer"], tokenizer.hash),
    ):
        if stored_value != value:
            raise UserError(
                f"{path} is stale: its {what} is {stored_value}, now it is {value}; {remedy}"
            )
    dropped = [(reason, key) for reason, key in head["dropped"]]
    return ShardIndex(
        kind=kind,
        tokenizer_hash=tokenizer.hash,
        shard_bytes=shard_bytes,
        dropped=dropped,
        digest=head["digest"],
        **arrays,
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
    arrays = {
        "start": np.array([sample.start for sample, _, _ in usable], np.int64),
        "stop": np.array([sample.stop for sample, _, _ in usable], np.int64),
        "crc": np.array([crc for _, crc, _ in usable], np.uint32),
        "segment": np.concatenate([segments for _, _, segments in usable]),
        "border": _borders([len(segments) for _, _, segments in usable]),
        "key_bytes": np.frombuffer(b"".join(keys), np.uint8),
        "key_border": _borders([len(key) for key in keys]),
    }
    digest = hashlib.sha256()
    for name in ARRAYS:
        digest.update(arrays[name].tobytes())
    return ShardIndex(
        kind=kind,
        tokenizer_hash=tokenizer.hash,
        shard_bytes=shard_bytes,
        dropped=dropped,
        digest=digest.hexdigest(),
        **arrays,
    )


def _borders(counts: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".index")


def _no_document(path: Path, *, kind: Kind, found: tar.Scan, dropped: list[tuple[str, str]]) -> str:
    extensions = ", ".join(f".{name}" for name, _ in found.extensions.most_common(8)) or "no files"
    reasons = ", ".join(
        f"{count} {reason}" for reason, count in Counter(r for r, _ in dropped).most_common()
    )
    return (
        f"{path} holds no document of kind {kind.value}: it has {extensions} ({reasons}); "
        f"see docs/data-format.md for what a {kind.value} shard holds."
    )
