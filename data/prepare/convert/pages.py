"""Markdown and HTML files as documents: a file is one, with the images that it links to."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.prepare.convert import hypertext, markdown, values
from data.prepare.convert.interleaved import Assembly
from data.prepare.convert.left_out import LeftOut, Unusable
from data.prepare.convert.options import Form, Reading
from data.prepare.convert.plain import Parts
from data.prepare.convert.tasks import Piece


def read(piece: Piece, *, reading: Reading, left_out: LeftOut) -> Iterator[Parts]:
    """The document of one file; images that cannot be used are left out while the text stays."""
    assembly = Assembly(where=piece.path, left_out=left_out)

    def image(link: str) -> bytes | None:
        try:
            return _image(link, file=piece.file, root=reading.image_root)
        except Unusable as reason:
            assembly.leave_out(reason, which=link)
            return None

    try:
        text = values.decode(values.read_bounded(piece.file))
        html = markdown.to_html(text) if reading.form is Form.markdown else text
        parts = hypertext.read(html, image=image)
    except Unusable as reason:
        left_out.add(reason, where=piece.path)
        return
    for part in parts:
        if isinstance(part, str):
            assembly.text(part)
        else:
            assembly.image(part)
    yield from assembly.finished()


def _image(link: str, *, file: Path, root: Path | None) -> bytes:
    """The image behind a link, as it stands or with %20 and ?query understood.

    A path that begins with / is one of the site, whose root is `root` or else the file's folder.
    """
    link = link.strip()
    if not link:
        raise Unusable("image without a link", expected=True)
    try:
        names = [link, unquote(urlsplit(link).path)]
    except ValueError:
        names = [link]
    folders = [root or file.parent]
    if not link.startswith("/"):
        folders.insert(0, file.parent)
    paths = [folder / name.lstrip("/") for name in names for folder in folders]
    return values.linked(link, paths=paths, within=[root or file.parent, file.parent])
