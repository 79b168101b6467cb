"""Samples of tars that others wrote: images with captions, and texts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data import tar
from data.compression import DamagedError
from data.documents import IMAGE_EXTENSIONS
from data.prepare.convert import captions, streams, values
from data.prepare.convert.captions import Captioned
from data.prepare.convert.left_out import LeftOut, Unusable
from data.prepare.convert.options import Reading
from data.prepare.convert.tasks import Piece
from data.prepare.findings import DEFECTS
from data.samples import NotAShardError, Sample

BYTES_PER_SAMPLE = 10_000
GZIPPED = ".gz"
Members = dict[str, bytes]


def read_captions(
    piece: Piece, *, reading: Reading, scratch: Path, left_out: LeftOut
) -> Iterator[Captioned]:
    """The image and the text of every sample; failed downloads are left out."""
    for where, members in _samples(piece, scratch=scratch, left_out=left_out):
        try:
            fields = _fields(members, needed=reading.text_field is not None)
            if fields.get("status", "success") != "success":
                raise Unusable("download that failed (`status` in .json)", expected=True)
            caption = _caption(members, fields, reading=reading, where=where, left_out=left_out)
        except Unusable as reason:
            left_out.add(reason, where=_has(where, members))
            continue
        left_out.used()
        yield caption


def read_texts(
    piece: Piece, *, reading: Reading, scratch: Path, left_out: LeftOut
) -> Iterator[str]:
    """The text member of every sample."""
    for where, members in _samples(piece, scratch=scratch, left_out=left_out):
        try:
            text = _member(members, reading.text_extension).strip("\n")
            if not text.strip():
                raise Unusable("no text")
        except Unusable as reason:
            left_out.add(reason, where=_has(where, members))
            continue
        left_out.used()
        yield text


def _caption(
    members: Members, fields: dict, *, reading: Reading, where: str, left_out: LeftOut
) -> Captioned:
    images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
    if len(images) != 1:
        raise Unusable("several images" if images else "no image")
    image = values.checked(images[0])
    field = reading.text_field
    if field is None:
        # The member takes the place of a field that no .json has.
        field = f".{reading.text_extension}"
        fields = {**fields, field: _member(members, reading.text_extension)}
    found = captions.texts(
        fields,
        text_field=field,
        fallback_field=reading.fallback_field,
        only_first=not reading.lists,
        where=where,
        left_out=left_out,
    )
    return Captioned(image, found, is_list=isinstance(fields.get(field), list))


def _fields(members: Members, *, needed: bool) -> dict:
    try:
        fields = json.loads(values.decode(members.get("json", b"{}")))
    except (ValueError, RecursionError, Unusable):
        fields = None
    if isinstance(fields, dict):
        return fields
    if needed:
        raise Unusable("no JSON object in .json")
    return {}


def _member(members: Members, extension: str) -> str:
    return values.decode(members.get(extension, b""))


def _has(where: str, members: Members) -> str:
    return f"{where} (has {', '.join(f'.{name}' for name in sorted(members)[:8])})"


def _samples(piece: Piece, *, scratch: Path, left_out: LeftOut) -> Iterator[tuple[str, Members]]:
    """Place and members of every whole sample."""
    with _plain(piece, scratch=scratch, left_out=left_out) as path:
        try:
            found = tar.scan(path)
        except NotAShardError as error:
            where = str(error).partition(";")[0].replace(str(path), piece.path)
            left_out.add("file that is no tar", where=where)
            return
        with path.open("rb") as file:
            for sample in found.samples:
                where = f"{piece.path}:{sample.key}"
                try:
                    members = _members(file, sample)
                except Unusable as reason:
                    left_out.add(reason, where=where)
                    continue
                yield where, members
    for reason, detail in found.contents.defects:
        left_out.note(DEFECTS[reason], where=f"{piece.path} ({detail})")


def _members(file: BinaryIO, sample: Sample) -> Members:
    """By extension; a gzipped member is unpacked and loses its .gz."""
    if sample.fault:
        raise Unusable(DEFECTS[sample.fault])
    if sample.stop - sample.start > values.MAX_BYTES:
        raise Unusable(f"sample of more than {values.MEBIBYTES} MiB")
    file.seek(sample.start)
    members = tar.members_of(file.read(sample.stop - sample.start))
    return {
        name.removesuffix(GZIPPED): streams.gunzip(data) if name.endswith(GZIPPED) else data
        for name, data in members.items()
    }


@contextmanager
def _plain(piece: Piece, *, scratch: Path, left_out: LeftOut) -> Iterator[Path]:
    """The tar itself, or an unpacked copy of it in `scratch` while it is read."""
    if streams.packed_as(piece.file) is None:
        yield piece.file
        return
    copy = scratch / "unpacked.tar"
    with streams.opened(piece.file) as packed, copy.open("wb") as file:
        try:
            while chunk := packed.read1(1 << 20):  # `read` loses what lies before the damage
                file.write(chunk)
        except DamagedError as error:
            left_out.note("compressed file that is cut or damaged", where=f"{piece.path} ({error})")
    try:
        yield copy
    finally:
        copy.unlink()
