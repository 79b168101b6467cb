"""Pixels as pictures for people: data URLs inside an HTML page, and rows of pairs."""

import base64
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data import atomic

GAP_PIXELS = 4


def jpeg_url(pixels: np.ndarray, *, most_pixels: int) -> str:
    """uint8[H, W, 3] as a data URL, at most `most_pixels` on a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((most_pixels, most_pixels))
    return _url(image, form="JPEG", quality=85)


def png_url(pixels: np.ndarray) -> str:
    """uint8[H, W, 3] as a data URL, every pixel as it is."""
    return _url(Image.fromarray(pixels), form="PNG", optimize=True)


def pairs(
    above: np.ndarray, below: np.ndarray, *, across: int = 8, least_pixels: int = 128
) -> np.ndarray:
    """uint8[H, W, 3]: every image of uint8[M, S, S, 3] `above` its partner, `across` pairs a row.

    Small images are enlarged by a whole number, so that every pixel stays a square.
    """
    count, side = len(above), above.shape[1]
    scale = max(1, -(-least_pixels // side))
    cell, rows = side * scale + GAP_PIXELS, -(-count // across)
    height = 2 * cell + GAP_PIXELS
    page = np.full((rows * height, min(count, across) * cell, 3), 255, np.uint8)
    for number, pair in enumerate(zip(above, below, strict=True)):
        row, column = divmod(number, across)
        for half, image in enumerate(pair):
            large = image.repeat(scale, axis=0).repeat(scale, axis=1)
            top, left = row * height + half * cell, column * cell
            page[top : top + len(large), left : left + len(large)] = large
    return page


def write_png(pixels: np.ndarray, path: Path) -> None:
    """A file that appears whole."""
    with atomic.writing(path) as file:
        Image.fromarray(pixels).save(file, "PNG", optimize=True)


def _url(image: Image.Image, *, form: str, **options: object) -> str:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
