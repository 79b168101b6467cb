"""How images come into a model: as pixels, or as codes of a VQ model that also brings them out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data import images
from data.documents import Parts
from data.units import Units
from nmm.codes import ImageCodes
from nmm.config import ImageConfig


@dataclass(frozen=True)
class Seen:
    """`codes` is None where the model reads pixels, or no images."""

    image: ImageConfig
    codes: ImageCodes | None = None

    def parts(self, parts: Sequence[str | bytes | Units]) -> Parts:
        """What the model is given of a document: its images as codes, where it reads codes."""
        return [self._coded(part) if isinstance(part, bytes) else part for part in parts]

    def pixels(self, image: bytes | Units) -> np.ndarray:
        """uint8[S, S, 3]: an image as the model sees it."""
        seen = self._coded(image) if isinstance(image, bytes) else image
        if isinstance(seen, bytes):
            return images.decode(seen, self.image.side_pixels)
        return self.drawn(seen.values)

    def drawn(self, codes: np.ndarray) -> np.ndarray:
        """uint8[S, S, 3]: the image that the codes stand for."""
        assert self.codes is not None
        return self.codes.decode(codes[None])[0]

    def _coded(self, image: bytes) -> bytes | Units:
        if self.codes is None:
            return image
        pixels = images.decode(image, self.codes.side_pixels)
        return Units(self.codes.encode(pixels[None])[0])
