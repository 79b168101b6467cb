"""Prompts as a user gives them: options in order, or a file with one document a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.documents import Parts, clean, json_object
from data.images import decode
from data.interleaved import places
from data.samples import BadSample
from nmm.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document; `name` says where it is from, `images` where its images are."""

    name: str
    parts: Parts
    images: list[str]

    def said(self) -> str:
        """Its texts, with [FILE] in the place of images."""
        files = iter(self.images)
        return "".join(
            p if isinstance(p, str) else f"[{Path(next(files)).name}]" for p in self.parts
        )


def of_options(given: Sequence[str | Path]) -> Prompt:
    """What --prompt (str) and --image (Path) gave, in their order; raises UserError."""
    parts: Parts = []
    for value in given:
        if isinstance(value, Path):
            parts.append(readable(value, said="--image"))
            continue
        try:
            parts.append(clean(value))
        except BadSample:
            raise UserError(
                "--prompt is not valid text (it has a NUL or half of a character); give UTF-8 text."
            ) from None
    return Prompt("1", parts, [str(value) for value in given if isinstance(value, Path)])


def of_file(path: Path) -> list[Prompt]:
    """One {"texts": [...], "images": [...]} a line, as in KEY.json of docs/data-format.md.

    Images are files beside it. Raises UserError.
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
    parts: Parts = []
    images: list[str] = []
    try:
        layout = json_object({"json": line.encode()})
        if "texts" not in layout:
            raise BadSample("bad_layout")
        for place in places(layout):
            if isinstance(place, str):
                parts += [clean(place)] if place else []
            elif place.name:
                images.append(place.name)
                parts.append(readable(path.parent / place.name, said=where))
    except BadSample as bad:
        raise UserError(
            f"{where} is no document ({bad.reason}); write it like "
            '{"texts": ["A cat:", null], "images": [null, "cat.jpg"]}.'
        ) from None
    return Prompt(str(number), parts, images)


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
