"""Prompts as a user gives them: options in order, or a file with one document a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from data.documents import Parts, clean, json_object
from data.images import decode
from data.interleaved import places
from data.samples import BadSample
from nmm.errors import UserError

AFTER = "after_"  # begins the keys of what is behind a hole


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document, or all of it but a hole.

    `name` says where it is from, `images` where its images are. `after` are the parts behind a
    hole, which is to be filled in; None where there is none.
    """

    name: str
    parts: Parts
    images: list[str]
    after: Parts | None = None

    def said(self) -> str:
        """Its texts before a hole, with [FILE] in the place of images."""
        return _said(self.parts, self.images)

    def said_after(self) -> str:
        """The same behind it."""
        before = sum(not isinstance(part, str) for part in self.parts)
        return _said(self.after or [], self.images[before:])


def _said(parts: Parts, images: Sequence[str]) -> str:
    files = iter(images)
    return "".join(p if isinstance(p, str) else f"[{Path(next(files)).name}]" for p in parts)


class Hole(Enum):
    """What --hole gives: a place between parts."""

    here = "here"


def of_options(given: Sequence[str | Path | Hole]) -> Prompt:
    """What --prompt (str), --image (Path) and --hole gave, in their order; raises UserError."""
    holes = given.count(Hole.here)
    if holes > 1:
        raise UserError(f"--hole was given {holes} times, but one is filled in; give it once.")
    parts: Parts = []
    place = None
    for value in given:
        if isinstance(value, Hole):
            place = len(parts)
            continue
        if isinstance(value, Path):
            parts.append(readable(value, said="--image"))
            continue
        try:
            parts.append(clean(value))
        except BadSample:
            raise UserError(
                "--prompt is not valid text (it has a NUL or half of a character); give UTF-8 text."
            ) from None
    images = [str(value) for value in given if isinstance(value, Path)]
    return Prompt("1", parts[:place], images, None if place is None else parts[place:])


def of_file(path: Path) -> list[Prompt]:
    """One {"texts": [...], "images": [...]} a line, as in KEY.json of docs/data-format.md.

    Images are files beside it. With "after_texts" and "after_images" there is a hole before these.
    Raises UserError.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--prompts {path} cannot be read ({reason}); give a text file.") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts {path} has no lines; write one prompt a line.")
    return [_of_line(line, number=number, path=path) for number, line in numbered]


def _of_line(line: str, *, number: int, path: Path) -> Prompt:
    where = f"--prompts {path}, line {number}:"
    try:
        layout = json_object({"json": line.encode()})
        if "texts" not in layout:
            raise BadSample("bad_layout")
        parts, images = _parts(layout, folder=path.parent, where=where)
        after = None
        if AFTER + "texts" in layout:
            behind: dict[str, object] = {k: layout.get(AFTER + k) for k in ("texts", "images")}
            after, more = _parts(behind, folder=path.parent, where=where)
            images += more
    except BadSample as bad:
        raise UserError(
            f"{where} is no document ({bad.reason}); write it like "
            '{"texts": ["A cat:", null], "images": [null, "cat.jpg"]}.'
        ) from None
    return Prompt(str(number), parts, images, after)


def _parts(layout: dict[str, object], *, folder: Path, where: str) -> tuple[Parts, list[str]]:
    """The parts of a line, and the names of its images."""
    parts: Parts = []
    images: list[str] = []
    for place in places(layout):
        if isinstance(place, str):
            parts += [clean(place)] if place else []
        elif place.name:
            images.append(place.name)
            parts.append(readable(folder / place.name, said=where))
    return parts, images


def readable(path: Path, *, said: str) -> bytes:
    """The bytes of an image file that can be decoded; raises UserError."""
    try:
        image = path.read_bytes()
        decode(image, 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{said} {path} cannot be read ({reason}); give the path of an image file."
        ) from None
    except BadSample as bad:
        raise UserError(
            f"{said} {path} cannot be decoded ({bad.reason}); give a JPEG, PNG, WebP or GIF."
        ) from None
    return image
