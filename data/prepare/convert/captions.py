"""Images with their captions, from rows and from folders."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.prepare.convert import values
from data.prepare.convert.left_out import LeftOut, Unusable
from data.prepare.convert.options import Beside, Reading
from data.prepare.convert.rows import Row
from data.prepare.convert.tasks import Piece
from nmm.errors import UserError

# The bytes decide. Of the second line we read the first picture of mpo, which is JPEG, and jfif;
# the others are counted rather than passed over.
IMAGES = (
    "jpg", "jpeg", "png", "webp", "gif",
    "avif", "bmp", "heic", "jfif", "jp2", "jxl", "mpo", "svg", "tif", "tiff",
)  # fmt: skip
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Captioned:
    """An image with one text, or several if its source has a list, of whatever length."""

    image: bytes
    texts: list[str]
    is_list: bool = False


def from_rows(rows: Iterable[Row], *, reading: Reading, left_out: LeftOut) -> Iterator[Captioned]:
    """The image and the text of every row; the fallback field, if any, replaces a blank text."""
    image_field, text_field = reading.image_field, reading.text_field or "text"
    for row in rows:
        try:
            value, root = row.values.get(image_field), reading.image_root or row.folder
            image = values.image(value, field=image_field, root=root)
            found = texts(
                row.values,
                text_field=text_field,
                fallback_field=reading.fallback_field,
                only_first=not reading.lists,
                where=row.where,
                left_out=left_out,
            )
        except Unusable as reason:
            left_out.add(reason, where=row.where)
            continue
        left_out.used()
        yield Captioned(image, found, is_list=isinstance(row.values.get(text_field), list))


def texts(
    row: dict,
    *,
    text_field: str,
    fallback_field: str | None,
    only_first: bool,
    where: str,
    left_out: LeftOut,
) -> list[str]:
    """One text, or all of a list; raises Unusable if there is none."""
    for field in (text_field, fallback_field):
        value = row.get(field) if field is not None else None
        if not value:
            continue
        if isinstance(value, list):
            found = _usable(value, field=text_field, where=where, left_out=left_out)
        else:
            found = [values.text(value, field=text_field).strip()]
        if any(found):
            if field != text_field:
                left_out.note(f"no {text_field}, took {field}", where=where)
            if only_first and len(found) > 1:
                left_out.note("several captions, took the first", where=where)
                return found[:1]
            return found
    raise Unusable(f"no text in {text_field}")


def _usable(captions: list, *, field: str, where: str, left_out: LeftOut) -> list[str]:
    found = []
    for value in captions:
        try:
            text = values.text(value, field=field).strip()
            if not text:
                raise Unusable(f"no text in {field}")
            found.append(text)
        except Unusable as reason:
            left_out.note(f"{reason}: left out of a list of captions", where=where)
    return found


def walk(reading: Reading) -> Iterator[Path]:
    """Every image, or every file of metadata, of the folders in a fixed order, but no hidden one.

    Raises UserError for what is no folder, and for a folder without any.
    """
    for folder in reading.input:
        if not Path(folder).is_dir():
            raise UserError(
                f"--input is {folder}, which is no folder; captions-folder takes folders."
            )
        empty = True
        seen: set[str] = set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if (place := os.path.realpath(parent)) in seen:  # a link to where we have been
                folders.clear()
                continue
            seen.add(place)
            for name in sorted(names):
                if _is_wanted(name, text_from=reading.text_from):
                    empty = False
                    yield Path(parent, name)
        if empty:
            wanted = " or ".join(METADATA if reading.text_from is Beside.metadata else IMAGES[:5])
            raise UserError(f"--input is {folder}, which holds no {wanted}.")


def _is_wanted(name: str, *, text_from: Beside) -> bool:
    if name.startswith("."):
        return False
    if text_from is Beside.metadata:
        return name in METADATA
    return name.rpartition(".")[2].lower() in IMAGES


def from_folder(piece: Piece, *, reading: Reading, left_out: LeftOut) -> Iterator[Captioned]:
    """An image with the text of KEY.txt, or with the name of its folder."""
    try:
        image = values.checked(values.read_bounded(piece.file))
        if reading.text_from is Beside.folder_name:
            text = values.clean(piece.file.parent.resolve().name)
        else:
            text = _text_beside(piece.file)
    except Unusable as reason:
        left_out.add(reason, where=piece.path)
        return
    left_out.used()
    yield Captioned(image, [text])


def _text_beside(image: Path) -> str:
    path = image.with_suffix(".txt")
    if not path.is_file():
        raise Unusable("no .txt beside the image")
    text = values.decode(values.read_bounded(path)).strip()
    if not text:
        raise Unusable("no text in the .txt")
    return text
