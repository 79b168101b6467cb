"""Pixels as files inside an HTML page: data URLs."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image


def jpeg_url(pixels: np.ndarray, *, most_pixels: int) -> str:
    """uint8[H, W, 3] as a data URL, at most `most_pixels` on a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((most_pixels, most_pixels))
    return _url(image, form="JPEG", quality=85)


def png_url(pixels: np.ndarray) -> str:
    """uint8[H, W, 3] as a data URL, every pixel as it is."""
    return _url(Image.fromarray(pixels), form="PNG", optimize=True)


def _url(image: Image.Image, *, form: str, **options: object) -> str:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
