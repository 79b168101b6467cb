"""From the members of a sample to its documents.

A document is a list of parts in reading order: texts (str), images (bytes), and runs of units
(Units); how samples hold them is in docs/data-format.md.
"""

import base64
import json
from functools import lru_cache
from typing import NamedTuple

from data.interleaved import ImagePlace, places
from data.samples import BadSample
from data.units import UNITS_EXTENSION, NotUnitsError, Units, read_units
from nmm.config import Kind, Layout

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")
LONGEST_NAME = 255  # of a file; an image as base64 is longer

Parts = list[str | bytes | Units]


class Parsed(NamedTuple):
    """The parts of a document, and how many of its images the sample does not hold."""

    parts: Parts
    skipped_images: int

    @property
    def has_text(self) -> bool:
        """Is there one that is not blank?"""
        return any(isinstance(part, str) and part.strip() for part in self.parts)

    @property
    def has_units(self) -> bool:
        return any(isinstance(part, Units) for part in self.parts)


def variants(layout: Layout, members: dict[str, bytes]) -> int:
    """Documents of a sample: one for each caption of a list, else 1; never raises."""
    if layout.kind is not Kind.caption or layout.text_field is None:
        return 1
    try:
        return len(_captions(members, layout.text_field))
    except BadSample:
        return 1


def parse(layout: Layout, members: dict[str, bytes], *, key: str = "", variant: int = 0) -> Parsed:
    """A document of the sample `key`, whose members are named "jpg", "0.jpg", ...; or BadSample.

    `variant` chooses the caption where there are several.
    """
    field = layout.text_field
    match layout.kind:
        case Kind.caption:
            image = _image(members) if layout.modality is None else _units(members)
            found = Parsed([image, _caption(members, field=field, variant=variant)], 0)
        case Kind.interleaved:
            found = _interleaved(members, key=key, layout=layout)
        case Kind.text:
            found = Parsed([_plain_text(members, field=field)], 0)
        case Kind.units:
            found = Parsed([_units(members)], 0)
    may_be_mute = layout.kind in (Kind.units, Kind.interleaved) and found.has_units
    if not found.has_text and not may_be_mute:
        raise BadSample("empty_text")
    return found


def _units(members: dict[str, bytes]) -> Units:
    return _as_units(_member(members, UNITS_EXTENSION, missing="missing_units"))


def _as_units(data: bytes) -> Units:
    try:
        return read_units(data)
    except NotUnitsError:
        raise BadSample("bad_units") from None


def _image(members: dict[str, bytes]) -> bytes:
    images = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
    if not images:
        raise BadSample("missing_image")
    if len(images) > 1:
        raise BadSample("several_images")
    return images[0]


def _caption(members: dict[str, bytes], *, field: str | None, variant: int) -> str:
    if field is None:
        return _text(_member(members, "txt", missing="missing_text"))
    return _string(_captions(members, field)[variant])


def _captions(members: dict[str, bytes], field: str) -> list:
    """The captions of an image as they are in its JSON: one, or a list of them."""
    value = _field(members, field)
    if isinstance(value, list) and not value:
        raise BadSample("empty_text")
    return value if isinstance(value, list) else [value]


def _plain_text(members: dict[str, bytes], *, field: str | None) -> str:
    if field is None:
        return _text(_member(members, "txt", missing="missing_text"))
    return _string(_field(members, field))


def _field(members: dict[str, bytes], name: str) -> object:
    """A field of the sample's JSON that is there and not null."""
    value = json_object(members).get(name)
    if value is None:
        raise BadSample("missing_text")
    return value


def _string(value: object) -> str:
    if value is None:
        raise BadSample("empty_text")
    if not isinstance(value, str):
        raise BadSample("bad_text")
    return clean(value)


def json_object(members: dict[str, bytes]) -> dict:
    """The object in the member "json"; raises BadSample."""
    found = _loaded(_member(members, "json", missing="missing_json"))
    if not isinstance(found, dict):
        raise BadSample("bad_layout")
    return found


@lru_cache(maxsize=1)  # a list of captions would be read again for each of them
def _loaded(data: bytes) -> object:
    try:
        # ValueError: also for a number of thousands of digits, which Python refuses to convert.
        return json.loads(_text(data))
    except (ValueError, RecursionError):
        raise BadSample("bad_json") from None


def _interleaved(members: dict[str, bytes], *, key: str, layout: Layout) -> Parsed:
    """Texts and images or units in reading order; what is not in the sample is left out."""
    parts: Parts = []
    skipped = 0
    for place in places(json_object(members)):
        if isinstance(place, str):
            parts += [clean(place)] if place else []
        elif (image := _image_of(place, members, key=key)) is not None:
            parts.append(image if layout.modality is None else _as_units(image))
        else:
            skipped += 1
    return Parsed(parts, skipped)


def _image_of(place: ImagePlace, members: dict[str, bytes], *, key: str) -> bytes | None:
    """The bytes of an image, or None if the sample does not hold it.

    A name is that of a member behind the sample's key, or the member's whole base name, or no name
    at all but the image as base64.
    """
    name = place.name
    stem, _, extension = name.partition(".")
    if name and name.lower() in members:
        return members[name.lower()]
    if name and stem == key.rpartition("/")[2] and extension.lower() in members:
        return members[extension.lower()]
    if place.base64:
        return _from_base64(place.base64)
    is_image = name.startswith("data:") or (len(name) > LONGEST_NAME and "://" not in name)
    return _from_base64(name) if is_image else None


def _from_base64(text: str) -> bytes | None:
    """The bytes of base64, with or without `data:image/png;base64,` in front; None: there are none.

    A line may end anywhere in it.
    """
    head, comma, data = text.partition(",")
    body = data if comma and head.startswith("data:") else text
    try:
        return base64.b64decode("".join(body.split()), validate=True) or None
    except ValueError:
        raise BadSample("bad_base64") from None


def _member(members: dict[str, bytes], name: str, *, missing: str) -> bytes:
    if name not in members:
        raise BadSample(missing)
    return members[name]


def _text(data: bytes) -> str:
    try:
        return clean(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadSample("not_utf8") from None


def clean(text: str) -> str:
    """Line ends become \\n. NUL is the sign of another encoding; lone surrogates have none."""
    if "\0" in text:
        raise BadSample("nul_in_text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("not_utf8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
