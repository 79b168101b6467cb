"""Reading data made by others: every form yields documents as parts in reading order.

What cannot be used is counted by reason and is never fatal, but 100 documents or images in a row
are: then it is the command that is wrong, not the data.
"""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data.shards import image_extension
from nmm.errors import UserError

Parts = list[str | bytes]
What = Literal["document", "image"]
IN_A_ROW = 100
EXAMPLES = 3
BETWEEN_TEXTS = "\n\n"


class Unusable(Exception):  # noqa: N818 - a verdict on a piece of data, counted and not fatal
    """A text or an image that cannot be used; the message is the reason."""


class LeftOut:
    """Counts what was left out by reason, with the places of the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._in_a_row: Counter[What] = Counter()

    def add(self, reason: str, *, where: str, what: What = "document") -> None:
        """Count a loss; raises UserError at the hundredth since the last `used`."""
        self.note(reason, where=where)
        self._in_a_row[what] += 1
        if self._in_a_row[what] == IN_A_ROW:
            raise UserError(
                f"--input has {IN_A_ROW} {what}s in a row that cannot be used, the last at {where} "
                f"({reason}); check the form, the fields and the --image-root of the command."
            )

    def note(self, reason: str, *, where: str) -> None:
        """Count something worth knowing that is not a loss of a document."""
        self.counts[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(where)

    def used(self, what: What = "document") -> None:
        self._in_a_row[what] = 0

    def report(self) -> str:
        """A line per reason, most frequent first; empty when there is nothing to say."""
        lines = [
            f"{count:8}  {reason} (first: {', '.join(self._examples[reason])})\n"
            for reason, count in self.counts.most_common()
        ]
        return "".join(lines)


def captions(
    paths: list[Path],
    *,
    image_root: Path | None,
    image_field: str,
    text_field: str,
    fallback_field: str | None,
    left_out: LeftOut,
) -> Iterator[Parts]:
    """[image, text] of every line; the fallback field, if any, replaces a blank text."""
    for where, folder, row in _rows(paths, left_out=left_out):
        try:
            image = _image(row.get(image_field), field=image_field, root=image_root or folder)
            text = _text(row.get(text_field) or "", field=text_field).strip()
            if not text and fallback_field is not None:
                text = _text(row.get(fallback_field) or "", field=fallback_field).strip()
                if text:
                    left_out.note(f"no {text_field}, took {fallback_field}", where=where)
            if not text:
                raise Unusable(f"no text in {text_field}")
        except Unusable as reason:
            left_out.add(str(reason), where=where)
            continue
        left_out.used()
        yield [image, text]


def interleaved(
    paths: list[Path], *, image_root: Path | None, image_field: str, left_out: LeftOut
) -> Iterator[Parts]:
    """Texts and images of every line's `sequence`; adjacent texts are joined by a blank line."""
    for where, folder, row in _rows(paths, left_out=left_out):
        sequence = row.get("sequence")
        if not isinstance(sequence, list):
            left_out.add("no list in sequence", where=where)
            continue
        parts: Parts = []
        for segment in sequence:
            try:
                part = _segment(segment, image_field=image_field, root=image_root or folder)
            except Unusable as reason:
                left_out.add(f"{reason}: left out of its document", where=where, what="image")
                continue
            if isinstance(part, bytes):
                left_out.used("image")
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += BETWEEN_TEXTS + part
            elif part:
                parts.append(part)
        if any(isinstance(part, str) for part in parts):
            left_out.used()
            yield parts
        else:
            left_out.add("no text in sequence", where=where)


def texts(
    paths: list[Path], *, document_characters: int | None, left_out: LeftOut
) -> Iterator[Parts]:
    """One document per file, or per about `document_characters`."""
    for path in paths:
        try:
            text = _decode(path.read_bytes())
            if not text.strip():
                raise Unusable("no text in the file")
        except Unusable as reason:
            left_out.add(str(reason), where=str(path))
            continue
        left_out.used()
        if document_characters is None:
            yield [text.strip("\n")]
        else:
            for piece in split_text(text, characters=document_characters):
                yield [piece]


def split_text(text: str, *, characters: int) -> Iterator[str]:
    """Pieces that end at a blank line after `characters`, or at a line end after twice that."""
    lines: list[str] = []
    length = 0
    for line in text.split("\n"):
        lines.append(line)
        length += len(line) + 1
        if length >= (2 if line.strip() else 1) * characters:
            yield from _piece(lines)
            lines, length = [], 0
    yield from _piece(lines)


def _piece(lines: list[str]) -> Iterator[str]:
    piece = "\n".join(lines).strip("\n")
    if piece.strip():
        yield piece


def _rows(paths: list[Path], *, left_out: LeftOut) -> Iterator[tuple[str, Path, dict]]:
    """Place, folder and value of every line that holds a JSON object; blank lines do not count."""
    for path in paths:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path.name}:{number}"
                try:
                    text = _decode(line).strip()
                    row = json.loads(text) if text else None
                except Unusable as reason:
                    left_out.add(str(reason), where=where)
                    continue
                except (ValueError, RecursionError):
                    left_out.add("not JSON", where=where)
                    continue
                if isinstance(row, dict):
                    yield where, path.parent, row
                elif text:
                    left_out.add("not a JSON object", where=where)


def _segment(segment: object, *, image_field: str, root: Path) -> str | bytes:
    if not isinstance(segment, dict) or segment.get("type") not in ("text", "image"):
        raise Unusable("segment that is neither text nor image")
    if segment["type"] == "text":
        return _text(segment.get("text"), field="text").strip()
    return _image(segment.get(image_field), field=image_field, root=root)


def _text(value: object, *, field: str) -> str:
    """A string with \\n at its line ends."""
    if not isinstance(value, str):
        raise Unusable(f"no text in {field}")
    return _normalised(value)


def _image(value: object, *, field: str, root: Path) -> bytes:
    """Bytes of a file that begins like a JPEG, PNG, WebP or GIF."""
    if not isinstance(value, str) or not value:
        raise Unusable(f"no path in {field}")
    try:
        image = (root / value).read_bytes()
    except (OSError, ValueError):
        raise Unusable("image that cannot be read") from None
    if image_extension(image) == "bin":
        raise Unusable("image that is not JPEG, PNG, WebP or GIF")
    return image


def _decode(data: bytes) -> str:
    """UTF-8 with or without a byte order mark."""
    try:
        return _normalised(data.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None


def _normalised(text: str) -> str:
    """Line ends become \\n; a NUL or half a surrogate pair is the sign of broken text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("half a surrogate pair in the text") from None
    if "\0" in text:
        raise Unusable("NUL in the text")
    return text.replace("\r\n", "\n").replace("\r", "\n")
