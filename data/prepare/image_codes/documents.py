"""The documents of a shard with their images, and how they are written with codes instead."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import container
from data.documents import IMAGE_EXTENSIONS, Parts, parse, variants
from data.prepare.convert.left_out import LeftOut
from data.samples import BadSample
from data.shards import ShardWriter
from data.units import UNITS_EXTENSION, Units, npy
from nmm.config import Kind, Layout
from nmm.errors import UserError

KINDS = (Kind.caption, Kind.interleaved)


@dataclass(frozen=True)
class Document:
    """A sample: its members by extension, and its parts in reading order."""

    key: str
    members: dict[str, bytes]
    parts: Parts

    @property
    def images(self) -> list[bytes]:
        return [part for part in self.parts if isinstance(part, bytes)]


def check(layout: Layout, *, key: str) -> None:
    """Refuse shards that hold no images; raises UserError."""
    if layout.kind not in KINDS:
        raise UserError(f"{key} is {layout.kind.value}, which has no images; give caption shards.")
    if layout.modality is not None:
        raise UserError(f"{key} holds {layout.modality.value} units, not images; leave it out.")


def read(path: Path, layout: Layout, *, left_out: LeftOut) -> Iterator[Document]:
    """Every sample that training could read, in the order of the shard; the others are counted."""
    contents, samples = container.read(path)
    for place, raw in samples:
        try:
            if place.fault:
                raise BadSample(place.fault)
            members = container.members_of(path.name, raw)
            document = Document(place.key, members, _parts(layout, members, key=place.key))
        except BadSample as bad:
            left_out.note(bad.reason, where=f"{path.name}: {place.key}")
            continue
        yield document
    for reason, detail in contents.defects:
        left_out.note(reason, where=f"{path.name} {detail}")


def _parts(layout: Layout, members: dict[str, bytes], *, key: str) -> Parts:
    """The parts of the first usable document; all of a caption sample have the same image."""
    bad = BadSample("empty_text")
    for variant in range(variants(layout, members)):
        try:
            return parse(layout, members, key=key, variant=variant).parts
        except BadSample as error:
            bad = error
    raise bad


def write(writer: ShardWriter, document: Document, codes: Sequence[np.ndarray], kind: Kind) -> None:
    """The document with codes in the place of its images.

    Of a caption all other members stay as they are.
    """
    if kind is Kind.caption:
        (only,) = codes
        others = {k: v for k, v in document.members.items() if k not in IMAGE_EXTENSIONS}
        writer.members(document.key, {UNITS_EXTENSION: npy(only), **others})
        return
    following = iter(codes)
    parts = [Units(next(following)) if isinstance(part, bytes) else part for part in document.parts]
    writer.interleaved(document.key, parts)
