"""A value of a foreign row or page -> clean text, or the bytes of an image that we read."""

import base64
import binascii
import codecs
import errno
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

from data.prepare.convert.left_out import Unusable
from data.shards import image_extension
from nmm.errors import UserError

MAX_BYTES = 1 << 28  # of one image, line or page; larger ones are no documents
MEBIBYTES = MAX_BYTES >> 20
URL = re.compile(r"(?:[a-z][a-z0-9+.-]+:)?//|(?:https?|file|blob|cid):", re.IGNORECASE)
DATA_URI = re.compile(r"data:[^,]*,", re.IGNORECASE)
# JPEG, PNG, GIF and WebP as base64; no path of such a length begins like that.
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
BASE64_CHARACTERS = 48
# What a path alone can be the reason for; all else is the disk, and no reason to leave data out.
NOT_THERE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES,
    errno.EPERM, errno.EINVAL, errno.EILSEQ,
}  # fmt: skip
SVG_STARTS = (b"<svg", b"<?xml", b"<!doctype svg", b"<!--")


def decode(data: bytes) -> str:
    """UTF-8 with or without a byte order mark, with \\n at its line ends."""
    try:
        return clean(data.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError:
        raise Unusable("not UTF-8") from None


def clean(text: str) -> str:
    """Line ends become \\n; a NUL or half a surrogate pair is the sign of broken text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("half a surrogate pair in the text") from None
    if "\0" in text:
        raise Unusable("NUL in the text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text(value: object, *, field: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"no text in {field}")
    return clean(value)


def image(value: object, *, field: str, root: Path) -> bytes:
    """The image that a row holds or names.

    That is bytes, {"bytes": ..., "path": ...}, base64, a data URI, or a path below `root`.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return checked(value)
    if not isinstance(value, str) or not value:
        raise Unusable(f"no image in {field}")
    if len(value) >= BASE64_CHARACTERS and value.startswith(BASE64_STARTS):
        return checked(_base64(value))
    return linked(value, paths=[root / value], within=[root])


def linked(link: str, *, paths: Sequence[Path], within: Sequence[Path]) -> bytes:
    """The image of a data URI, or of the first of the `paths` that is a file; no URL is fetched.

    Other people's pages must not choose any file of this machine: a path is taken if it lies below
    one of the folders `within`. What links on the disk point to is the user's own affair.
    """
    if match := DATA_URI.match(link):
        body = link[match.end() :]
        if match[0].lower().endswith(";base64,"):
            return checked(_base64(unquote(body)))
        return checked(unquote_to_bytes(body.encode(errors="replace")))
    if URL.match(link):
        raise Unusable("image given by a URL, never fetched", expected=True)
    inside = [path for path in paths if any(_is_below(path, folder) for folder in within)]
    if not inside:
        raise Unusable("image outside of --image-root")
    return checked(_file(inside))


def _is_below(path: Path, folder: Path) -> bool:
    """Does it lie there, with each .. taken back?"""
    return os.path.abspath(path).startswith(os.path.join(os.path.abspath(folder), ""))


def checked(image: bytes) -> bytes:
    """The bytes, if they begin like a format that we read."""
    if not image:
        raise Unusable("image of 0 bytes")
    if image_extension(image) != "bin":
        return image
    start = image[:4096].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if start.startswith(SVG_STARTS) and b"<svg" in start:
        raise Unusable("SVG image", expected=True)
    raise Unusable("image that is not JPEG, PNG, WebP or GIF")


def read_bounded(path: Path) -> bytes:
    """All bytes of a regular file of moderate size; a device may never end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("not a file")
        if status.st_size > MAX_BYTES:
            raise Unusable(f"file of more than {MEBIBYTES} MiB")
        return path.read_bytes()
    except ValueError:  # a NUL in the path
        raise Unusable("file that cannot be read") from None
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise UserError(f"{path} could not be read: {error.strerror}.") from error
        raise Unusable("file that cannot be read") from None


def _base64(value: str) -> bytes:
    try:
        return base64.b64decode(value)
    except (binascii.Error, ValueError):
        raise Unusable("image with broken base64") from None


def _file(paths: Sequence[Path]) -> bytes:
    for path in paths:
        try:
            return read_bounded(path)
        except Unusable:
            continue
    raise Unusable("image that cannot be read")
