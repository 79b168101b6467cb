"""The index beside a shard: every document's place, checksum and exact token counts."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data import columns
from data.sequences import IMAGE_SEGMENT
from data.store import LOCAL, Store, is_url
from data.tokenizer import Tokenizer
from data.totals import Totals
from nmm.config import Layout, UnitModality
from nmm.errors import UserError

FORMAT = 3
NO_TOKENS = np.zeros(0, np.uint32)


@dataclass(frozen=True)
class ShardIndex:
    """N usable documents of one shard, in the shard's order. X.tar has its index in X.tar.index.

    start, stop  int64[N]    bytes [start, stop) of the shard, from the first header of the document
    crc          uint32[N]   crc32 of these bytes
    text_counts  int32[N]    text tokens of every document
    image_counts int32[N]    images of every document
    unit_counts  int32[N]    positions of its runs of units, with their begins and ends
    segment      int32[S]    of all documents: tokens of a text, sequences.IMAGE_SEGMENT, or minus
                 the positions of a run of units
    border       int64[N+1]  document i has segments [border[i], border[i+1])
    variant      int32[N]    number of its text among those of its sample: 0, or of several captions
    skipped      int32[N]    images that the document names and the sample does not hold
    token_crc    uint32[N]   crc32 of a document's part of the stored token ids; [0] without them
    key_bytes    uint8[K]    keys as UTF-8; document i has bytes [key_border[i], key_border[i+1])
    key_border   int64[N+1]
    dropped      (reason, key) of what the shard holds and nobody will read
    """

    layout: Layout
    tokenizer_hash: str
    shard_bytes: int
    totals: Totals
    dropped: list[tuple[str, str]]
    start: np.ndarray
    stop: np.ndarray
    crc: np.ndarray
    text_counts: np.ndarray
    image_counts: np.ndarray
    unit_counts: np.ndarray
    segment: np.ndarray
    border: np.ndarray
    variant: np.ndarray
    skipped: np.ndarray
    token_crc: np.ndarray
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
        return 2 + self.text_counts + self.unit_counts + image_tokens * self.image_counts

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
            "kind": self.layout.kind.value,
            "text_field": self.layout.text_field,
            "modality": _name(self.layout.modality),
            "tokenizer": self.tokenizer_hash,
            "shard_bytes": self.shard_bytes,
            **asdict(self.totals),
        }
        arrays = {name: vars(self)[name] for name in ARRAYS}
        dropped = np.frombuffer(json.dumps(self.dropped).encode(), np.uint8)
        columns.write(path, values=head, arrays={**arrays, "dropped": dropped})


DIGESTED = ("start", "stop", "crc", "segment", "border", "key_bytes", "key_border")
COUNTS = ("text_counts", "image_counts", "unit_counts", "skipped")
ARRAYS = (*DIGESTED, "variant", "token_crc", *COUNTS)


def read_totals(
    shard: Path | str,
    *,
    layout: Layout,
    tokenizer: Tokenizer,
    store: Store = LOCAL,
    shard_bytes: int | None = None,
) -> Totals:
    """The totals of a shard from the first line of its index; raises UserError like `load`.

    `shard_bytes` is the size of the shard, for who knows it already.
    """
    shard = str(shard)
    path = store.find_index(shard)
    shard_bytes = store.size(shard) if shard_bytes is None else shard_bytes
    what_to_do = partial(remedy, shard, layout=layout, tokenizer=tokenizer, store=store)
    try:
        head = columns.read_head(path).values
    except FileNotFoundError:
        if shard_bytes == 0:
            raise UserError(
                f"{shard} is empty (0 bytes); write the shard again, or delete it."
            ) from None
        raise UserError(f"{shard} has no index; {what_to_do()}") from None
    except (OSError, ValueError):
        raise UserError(f"{path} is damaged; {what_to_do()}") from None
    for what, stored, value in (
        ("format", head.get("format"), FORMAT),
        ("kind", head.get("kind"), layout.kind.value),
        ("text_field", head.get("text_field"), layout.text_field),
        ("modality", head.get("modality"), _name(layout.modality)),
        ("shard size in bytes", head.get("shard_bytes"), shard_bytes),
        ("tokenizer", head.get("tokenizer"), tokenizer.hash),
    ):
        if stored != value:
            again = what_to_do(store_tokens=bool(head.get("token_bytes")))
            raise UserError(f"{path} is stale: its {what} is {stored}, now it is {value}; {again}")
    try:
        return Totals.from_head(head)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is damaged; {what_to_do()}") from None


def load(
    shard: Path | str,
    *,
    layout: Layout,
    tokenizer: Tokenizer,
    store: Store = LOCAL,
    shard_bytes: int | None = None,
) -> ShardIndex:
    """The index of a shard, its arrays mapped into memory; `shard_bytes` as for `read_totals`.

    Raises UserError when it is missing, damaged, or belongs to something else.
    """
    totals = read_totals(
        shard, layout=layout, tokenizer=tokenizer, store=store, shard_bytes=shard_bytes
    )
    path = store.index_path(str(shard))
    try:
        head, arrays = columns.read(path, names=(*ARRAYS, "dropped"))
        dropped = [(reason, key) for reason, key in json.loads(arrays.pop("dropped").tobytes())]
        check_totals(totals, arrays)
    except (OSError, ValueError):
        again = remedy(str(shard), layout=layout, tokenizer=tokenizer, store=store)
        raise UserError(f"{path} is damaged; {again}") from None
    return ShardIndex(
        layout=layout,
        tokenizer_hash=tokenizer.hash,
        shard_bytes=head["shard_bytes"],
        totals=totals,
        dropped=dropped,
        **arrays,
    )


def check_totals(totals: Totals, arrays: dict[str, np.ndarray]) -> None:
    """ValueError where the first line, which has no checksum, says something else than the rest."""
    if len({len(arrays[name]) for name in ("start", "stop", "crc", "variant", *COUNTS)}) > 1:
        raise ValueError("arrays of several lengths")
    counted = (
        len(arrays["start"]),
        *(int(arrays[name].sum(dtype=np.int64)) for name in COUNTS),
        _digest(arrays),
    )
    said = (
        totals.documents,
        totals.text_tokens,
        totals.images,
        totals.unit_tokens,
        totals.skipped_images,
        totals.digest,
    )
    if counted != said:
        raise ValueError(f"the first line says {said}, the arrays hold {counted}")


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of all that is known of the documents."""
    digest = hashlib.sha256()
    for name in DIGESTED:
        digest.update(arrays[name].tobytes())
    if arrays["variant"].any():  # a corpus without variants keeps the digest it had before them
        digest.update(arrays["variant"].tobytes())
    return digest.hexdigest()


def join_segments(indexes: list[ShardIndex]) -> tuple[np.ndarray, np.ndarray]:
    """`segment` and `border` of the documents of all indexes, one after the other."""
    sizes = np.cumsum([0, *(len(each.segment) for each in indexes)])
    borders = [each.border[1:] + size for each, size in zip(indexes, sizes[:-1], strict=True)]
    segment = np.concatenate([each.segment for each in indexes])
    return segment, np.concatenate([[0], *borders])


def _name(modality: UnitModality | None) -> str | None:
    return modality.value if modality else None


def remedy(
    shard: str, *, layout: Layout, tokenizer: Tokenizer, store: Store, store_tokens: bool = False
) -> str:
    """What to do about an index that is missing or stale."""
    flags = f" --text-field {layout.text_field}" if layout.text_field else ""
    flags += f" --modality {layout.modality.value}" if layout.modality else ""
    flags += " --store-tokens" if store_tokens else ""
    flags += f" --index-dir {store.index_dir}" if is_url(shard) else ""
    return (
        f"run `python -m data.prepare.index --kind {layout.kind.value} --shards '{shard}' "
        f"--tokenizer {tokenizer.path}{flags}`."
    )


def assemble(
    *,
    layout: Layout,
    tokenizer_hash: str,
    shard_bytes: int,
    dropped: list[tuple[str, str]],
    segment: np.ndarray,
    border: np.ndarray,
    variant: np.ndarray,
    skipped: np.ndarray,
    largest_unit: int = -1,
    token_bytes: int = 0,
    token_crc: np.ndarray = NO_TOKENS,
    **places: np.ndarray,
) -> ShardIndex:
    """An index from its arrays; what can be counted from them is counted here."""
    arrays = {"segment": segment, "border": border, "variant": variant, **places}
    owner = np.repeat(np.arange(len(border) - 1), np.diff(border))
    runs = np.where(segment < IMAGE_SEGMENT, -segment, 0)
    text, units = (
        np.bincount(owner, tokens, minlength=len(border) - 1).astype(np.int32)
        for tokens in (np.maximum(segment, 0), runs)
    )
    images = np.bincount(owner[segment == IMAGE_SEGMENT], minlength=len(border) - 1)
    images = images.astype(np.int32)
    return ShardIndex(
        layout=layout,
        tokenizer_hash=tokenizer_hash,
        shard_bytes=shard_bytes,
        totals=Totals.count(
            text,
            images,
            skipped,
            units,
            longest_units=int(runs.max(initial=0)),
            largest_unit=largest_unit,
            token_bytes=token_bytes,
            digest=_digest(arrays),
        ),
        dropped=dropped,
        **arrays,
        skipped=skipped,
        token_crc=token_crc,
        text_counts=text,
        image_counts=images,
        unit_counts=units,
    )
