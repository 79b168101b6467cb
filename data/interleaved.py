"""The layouts of interleaved documents: where their texts and images stand, in reading order."""

from collections.abc import Iterator
from typing import NamedTuple

from data.samples import BadSample


class ImagePlace(NamedTuple):
    """Where an image of a document should be: a member of that name, or base64."""

    name: str
    base64: str = ""


Place = str | ImagePlace


def places(layout: dict) -> Iterator[Place]:
    """Of our layout, which is that of OBELICS, or of MMC4's; raises BadSample."""
    return _parallel(layout) if "texts" in layout else _matched(layout)


def _parallel(layout: dict) -> Iterator[Place]:
    """Of `texts` and `images`: at each place one of them is null, or both are."""
    texts, images = layout.get("texts"), layout.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise BadSample("bad_layout")
    for text, image in zip(texts, images, strict=True):
        if isinstance(text, str) and image is None:
            yield text
        elif text is None and (image is None or isinstance(image, str)):
            yield ImagePlace(name=image or "")
        else:
            raise BadSample("bad_layout")


def _matched(layout: dict) -> Iterator[Place]:
    """Of MMC4's `text_list` and `image_info`: images stand before the text that they match.

    Its texts are sentences without the spaces between them, so each but the first gets one.
    """
    texts, images = layout.get("text_list"), layout.get("image_info")
    if not isinstance(texts, list) or not isinstance(images, list):
        raise BadSample("bad_layout")
    before: dict[int, list[ImagePlace]] = {}
    for image in images:
        index, place = _match(image)
        before.setdefault(index, []).append(place)
    if not all(isinstance(text, str) for text in texts) or max(before, default=-1) >= len(texts):
        raise BadSample("bad_layout")
    for index, text in enumerate(texts):
        yield from before.get(index, [])
        yield f" {text}" if index and text else text


def _match(image: object) -> tuple[int, ImagePlace]:
    """The number of the text that an entry of `image_info` matches, and where its image is."""
    found = image if isinstance(image, dict) else {}
    index = found.get("matched_text_index")
    name, base64 = found.get("image_name") or "", found.get("image_base64") or ""
    if type(index) is not int or index < 0 or not isinstance(name, str):
        raise BadSample("bad_layout")
    if not isinstance(base64, str):
        raise BadSample("bad_base64")
    return index, ImagePlace(name, base64)
