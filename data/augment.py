"""What differs between the epochs of a document: the order of its parts, the view of its images."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.draws import Purpose, key, uniform, uniforms
from nmm.config import AugmentConfig

ASPECT_RATIOS = (3 / 4, 4 / 3)  # width divided by height
ATTEMPTS = 10
# The draws of an image: its flip, two for every attempt at a crop, and two for the crop's place.
FLIP, CROP, PLACE, DRAWS = 0, 1, 1 + 2 * ATTEMPTS, 32


class Box(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class View:
    """How image number `image` (0, 1, ...) of the document with these draws is seen in an epoch."""

    config: AugmentConfig
    key: int
    image: int

    @property
    def is_flipped(self) -> bool:
        """Left and right change places, in one half of the views."""
        return self.config.flip and self._draw(FLIP) < 0.5

    def box(self, height: int, width: int) -> Box | None:
        """What is shown of an upright image; None: the centre square, because nothing is drawn.

        As torchvision's RandomResizedCrop: of an area drawn evenly and an aspect ratio drawn
        evenly by its logarithm, the first of ten that fits lies anywhere; if none does, the
        largest centred part of an allowed ratio is shown.
        """
        if self.config.crop_area_fraction is None:
            return None
        for attempt in range(ATTEMPTS):
            found = self._attempt(CROP + 2 * attempt, area=height * width)
            if 0 < found.height <= height and 0 < found.width <= width:
                top, left = (
                    int(self._draw(PLACE + axis) * (room + 1))
                    for axis, room in enumerate((height - found.height, width - found.width))
                )
                return found._replace(top=top, left=left)
        return _centred(height, width)

    def _attempt(self, first: int, *, area: int) -> Box:
        """A box of the ratio and the area that two draws say, which may not fit."""
        least, (narrow, wide) = self.config.crop_area_fraction, map(math.log, ASPECT_RATIOS)
        assert least is not None
        area_of_box = area * (least + (1 - least) * self._draw(first))
        ratio = math.exp(narrow + (wide - narrow) * self._draw(first + 1))
        return Box(
            0, 0, round(math.sqrt(area_of_box / ratio)), round(math.sqrt(area_of_box * ratio))
        )

    def _draw(self, number: int) -> float:
        return uniform(self.key, self.image * DRAWS + number)


def views(
    config: AugmentConfig,
    images: int,
    *,
    seed: int,
    epoch: int,
    source: int,
    shard: int,
    document: int,
) -> list[View] | list[None]:
    """The views of a document's images in an epoch, whoever reads which of its pieces.

    None where nothing is drawn.
    """
    if config == AugmentConfig():
        return [None] * images
    draws = key(Purpose.view, seed=seed, epoch=epoch, source=source, shard=shard, document=document)
    return [View(config, draws, image) for image in range(images)]


def _centred(height: int, width: int) -> Box:
    narrow, wide = ASPECT_RATIOS
    box_height = min(height, round(width / narrow))
    box_width = min(width, round(height * wide))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def text_first(
    documents: np.ndarray, *, fraction: float, seed: int, epoch: int, source: int, shard: int
) -> np.ndarray:
    """bool[n]: which documents of a shard are laid out text first in an epoch.

    Planning and reading both ask here: the cuts of a long document follow from its order.
    """
    if not fraction:
        return np.zeros(len(documents), bool)
    words = documents.astype(np.uint64)
    place = {"seed": seed, "epoch": epoch, "source": source, "shard": shard}
    return uniforms(key(Purpose.text_first, **place, document=words), 0) < fraction
