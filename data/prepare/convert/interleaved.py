"""Documents of texts and images in reading order, from rows of three layouts."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from data.prepare.convert import values
from data.prepare.convert.left_out import LeftOut, Unusable
from data.prepare.convert.options import Reading
from data.prepare.convert.plain import Parts
from data.prepare.convert.rows import Row

PARAGRAPHS, SENTENCES = "\n\n", " "
SEQUENCE, OBELICS, MMC4 = ("sequence",), ("texts", "images"), ("text_list", "image_info")
COLUMNS = [["sequence", "texts", "text_list"], ["sequence", "images", "image_info"]]


class Item(NamedTuple):
    """Something in reading order that may become a part."""

    what: Literal["text", "image"]
    value: object


class Assembly:
    """The parts of one document as they are read; texts without an image between are joined."""

    def __init__(self, *, where: str, left_out: LeftOut, between: str = PARAGRAPHS) -> None:
        self.parts: Parts = []
        self._where, self._left_out, self._between = where, left_out, between

    def text(self, text: str) -> None:
        text = text.strip()
        if text and self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += self._between + text
        elif text:
            self.parts.append(text)

    def image(self, image: bytes) -> None:
        self._left_out.used("image")
        self.parts.append(image)

    def leave_out(self, reason: Unusable, *, which: str = "") -> None:
        where = f"{self._where} {which[:80]}".rstrip()
        self._left_out.add(reason, where=where, what="image")

    def finished(self) -> Iterator[Parts]:
        """The document, unless it has no text."""
        if any(isinstance(part, str) for part in self.parts):
            self._left_out.used()
            yield self.parts
        else:
            self._left_out.add("no text in the document", where=self._where)


def from_rows(rows: Iterable[Row], *, reading: Reading, left_out: LeftOut) -> Iterator[Parts]:
    """A document for every row; what cannot be used of it is left out while the rest stays."""
    for row in rows:
        between = SENTENCES if _has(row.values, MMC4) else PARAGRAPHS
        assembly = Assembly(where=row.where, left_out=left_out, between=between)
        try:
            items = _items(row.values, image_field=reading.image_field)
        except Unusable as reason:
            left_out.add(reason, where=row.where)
            continue
        root = reading.image_root or row.folder
        for item in items:
            try:
                _add(assembly, item, field=reading.image_field, root=root)
            except Unusable as reason:
                assembly.leave_out(reason)
        yield from assembly.finished()


def _add(assembly: Assembly, item: Item, *, field: str, root: Path) -> None:
    if isinstance(item.value, Unusable):
        raise item.value
    if item.what == "text":
        assembly.text(values.text(item.value, field="text"))
    else:
        assembly.image(values.image(item.value, field=field, root=root))


def _has(row: dict, keys: tuple[str, ...]) -> bool:
    return all(isinstance(row.get(key), list) for key in keys)


def _items(row: dict, *, image_field: str) -> list[Item]:
    if _has(row, SEQUENCE):
        return [_segment(segment, image_field=image_field) for segment in row["sequence"]]
    if _has(row, OBELICS):
        return _obelics(row["texts"], row["images"])
    if _has(row, MMC4):
        return _mmc4(row["text_list"], row["image_info"])
    raise Unusable("no list in sequence, in texts and images, or in text_list and image_info")


def _segment(segment: object, *, image_field: str) -> Item:
    """{"type": "text", "text": ...} or {"type": "image", FIELD: ...}."""
    if isinstance(segment, dict) and segment.get("type") == "text":
        return Item("text", segment.get("text"))
    if isinstance(segment, dict) and segment.get("type") == "image":
        return Item("image", segment.get(image_field))
    return Item("text", Unusable("segment that is neither text nor image"))


def _obelics(texts: list, images: list) -> list[Item]:
    """Parallel lists, null on one side; null on both stands for an image that was lost."""
    if len(texts) != len(images):
        raise Unusable("texts and images of different lengths")
    lost = Unusable("image that is null", expected=True)
    items = []
    for text, image in zip(texts, images, strict=True):
        if text is not None and image is not None:
            raise Unusable("text and image at the same place")
        items.append(Item("text", text) if text is not None else Item("image", image or lost))
    return items


def _mmc4(texts: list, images: list) -> list[Item]:
    """Sentences, and before each the images matched to it in the order of the list."""
    items = []
    matched: dict[object, list[Item]] = {}
    for image in images:
        index = image.get("matched_text_index") if isinstance(image, dict) else None
        known = isinstance(index, int) and 0 <= index < len(texts)
        matched.setdefault(index if known else 0, []).append(_matched(image, known=known))
    for index, text in enumerate(texts):
        items += [*matched.get(index, []), Item("text", text)]
    return items


def _matched(image: dict, *, known: bool) -> Item:
    if not known:
        return Item("image", Unusable("image that is matched to no text"))
    value = image.get("image_base64") or image.get("image_name")
    return Item("image", value or Unusable("image without bytes and name", expected=True))
