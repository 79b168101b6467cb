"""What becomes of images that are turned into codes and back: a picture and numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.pictures import pairs, write_png
from nmm.codes import ImageCodes, Usage

AT_ONCE = 32
ON_PICTURE = 32
NAME = "reconstructions.png"


@dataclass(frozen=True)
class Look:
    """Images uint8[M, S, S, 3], what came back of them, and how often every code occurs."""

    originals: np.ndarray
    decoded: np.ndarray
    usage: Usage

    @property
    def difference(self) -> float:
        """Mean absolute difference of a channel, as a fraction of its range."""
        return float(np.abs(self._differences()).mean() / 255)

    @property
    def psnr_db(self) -> float:
        """Peak signal-to-noise ratio over all images together; infinite if all is equal."""
        squared = float(np.square(self._differences()).mean())
        return 10 * float(np.log10(255**2 / squared)) if squared else float("inf")

    def _differences(self) -> np.ndarray:
        return self.originals.astype(np.float32) - self.decoded

    def picture(self, folder: Path) -> Path:
        """FOLDER/reconstructions.png: the first originals, each above what came back of it."""
        path = folder / NAME
        write_png(pairs(self.originals[:ON_PICTURE], self.decoded[:ON_PICTURE]), path)
        return path

    def said(self) -> str:
        return (
            f"{len(self.originals)} images come back with a mean difference of "
            f"{self.difference:.3f} of the range, PSNR {self.psnr_db:.1f} dB; {self.usage.said()}"
        )


def look(codes: ImageCodes, images: np.ndarray) -> Look:
    """Turn images into codes and back, some at a time."""
    counts = np.zeros(codes.codes, np.int64)
    decoded = []
    for start in range(0, len(images), AT_ONCE):
        found = codes.encode(images[start : start + AT_ONCE])
        counts += np.bincount(found.ravel(), minlength=codes.codes)
        decoded.append(codes.decode(found))
    return Look(images, np.concatenate(decoded), Usage(counts))
