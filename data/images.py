"""From the bytes of an image file to a square of RGB pixels: a pure function of them and a view."""

import struct
import warnings
from io import BytesIO
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image

from data.augment import Box, View
from data.samples import BadSample

MAX_PIXELS = 100_000_000
MAX_SCANS = 200  # a progressive JPEG has about ten
# Pillow's other formats are left out: none holds photographs, and EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
ORIENTATION_TAG = 0x0112
TRANSPOSED = (5, 6, 7, 8)  # orientations that exchange height and width
JPEG_START = b"\xff\xd8\xff"
START_OF_SCAN = b"\xda"
EXIF_SIGN = b"Exif\0\0"
EXIF_WITHIN_BYTES = 65536
# What Pillow raises on malformed files, seen or documented; OSError alone misses a sixth of them.
DECODER_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class Header(NamedTuple):
    """The size as it is stored, and the colour space of a JPEG, "" for other formats."""

    height: int
    width: int
    colours: str


def check_header(data: bytes) -> None:
    """Refuse, by BadSample, what is no image or is too large, before a pixel is decoded.

    A scan of a JPEG may be 12 bytes that all pixels are gone through for: a megabyte takes an hour.
    """
    _header(data)
    if data.startswith(JPEG_START) and data.count(b"\xff" + START_OF_SCAN) > MAX_SCANS:
        raise BadSample("image_scans")


def decode(data: bytes, side_pixels: int, *, view: View | None = None) -> np.ndarray:
    """uint8[side, side, 3] of the upright first frame on white, or BadSample.

    It is what the view shows; without one, the centre square.
    """
    header = _header(data)
    is_plain_jpeg = header.colours in ("RGB", "YCbCr")
    rgb = _decode_jpeg(data, header, side_pixels, view) if is_plain_jpeg else None
    if rgb is None:
        rgb = _decode_pillow(data)
        height, width, _ = rgb.shape
        rgb = _crop(rgb, view and view.box(height, width), size=(height, width))
    return _resize(rgb, side_pixels, is_flipped=view is not None and view.is_flipped)


def _header(data: bytes) -> Header:
    try:
        header = _read_header(data)
    except Image.DecompressionBombError:
        raise BadSample("image_pixels") from None
    except DECODER_ERRORS:
        raise BadSample("image_header") from None
    if header.width < 1 or header.height < 1:
        raise BadSample("image_header")
    if header.width * header.height > MAX_PIXELS:
        raise BadSample("image_pixels")
    return header


def _read_header(data: bytes) -> Header:
    if data.startswith(JPEG_START):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        return Header(int(height), int(width), colours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        width, height = Image.open(BytesIO(data), formats=FORMATS).size
    return Header(height, width, "")


def _decode_jpeg(
    data: bytes, header: Header, side_pixels: int, view: View | None
) -> np.ndarray | None:
    """uint8[H, W, 3], what a view shows, both at least side_pixels if the file allows it.

    None: let Pillow judge. Scaling inside the decoder pays from a factor of 2; below, it is slower
    than a full decode.
    """
    orientation = _orientation_of(data) if _may_have_exif(data) else 1
    size = header.height, header.width
    if orientation in TRANSPOSED:
        size = header.width, header.height
    box = view and view.box(*size)
    height, width = _least_size(header, side_pixels, box)
    try:
        rgb = simplejpeg.decode_jpeg(
            data, colorspace="RGB", min_height=height, min_width=width, min_factor=2
        )
    except ValueError:
        return None
    return _crop(_upright(rgb, orientation), box, size=size)


def _least_size(header: Header, side_pixels: int, box: Box | None) -> tuple[int, int]:
    """The (height, width) of an image of which the box still has side_pixels by side_pixels.

    One pixel more, because the edges of the box move to the nearest pixel.
    """
    if box is None:
        return side_pixels, side_pixels
    wanted, shown = side_pixels + 1, min(box.height, box.width)
    return -(-wanted * header.height // shown), -(-wanted * header.width // shown)


def _crop(rgb: np.ndarray, box: Box | None, *, size: tuple[int, int]) -> np.ndarray:
    """A box of an image of `size` = (height, width), of which `rgb` is a scaled copy.

    None: the centre square.
    """
    if box is None:
        return _centre_square(rgb)
    rows, columns = (
        slice(*((2 * edge * scaled + full) // (2 * full) for edge in (start, start + length)))
        for start, length, scaled, full in zip(box[:2], box[2:], rgb.shape, size, strict=False)
    )
    return rgb[rows, columns]


def _may_have_exif(data: bytes) -> bool:
    """False only if no segment before the pixels is EXIF; to search the bytes takes 4 times longer.

    A segment is FF, its marker, two bytes of length that count themselves, and its data.
    """
    at = 2
    while at < EXIF_WITHIN_BYTES and data[at : at + 1] == b"\xff":
        if data[at + 1 : at + 2] == START_OF_SCAN:
            return False
        if data.startswith(EXIF_SIGN, at + 4):
            return True
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at < EXIF_WITHIN_BYTES  # what is no segment is for Pillow to judge


def _decode_pillow(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(BytesIO(data), formats=FORMATS)
            image.load()
            rgb = _to_rgb(image)
        except DECODER_ERRORS:
            raise BadSample("image_decode") from None
        return _upright(rgb, _orientation(image))


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8[H, W, 3] from any mode; transparency shows white, 16 bits keep their upper 8."""
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image, np.int32), 0, 65535) >> 8
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating point pixels have no agreed white")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _orientation_of(data: bytes) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _orientation(Image.open(BytesIO(data), formats=FORMATS))
        except DECODER_ERRORS:
            return 1


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 .. 8; unreadable EXIF data leave the picture as it is stored."""
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except DECODER_ERRORS:
        return 1


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's rotation (EXIF 2.32, table 4, tag 274)."""
    match orientation:
        case 2:
            return rgb[:, ::-1]
        case 3:
            return rgb[::-1, ::-1]
        case 4:
            return rgb[::-1]
        case 5:
            return rgb.swapaxes(0, 1)
        case 6:
            return rgb[::-1].swapaxes(0, 1)
        case 7:
            return rgb[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return rgb[:, ::-1].swapaxes(0, 1)
    return rgb


def _centre_square(rgb: np.ndarray) -> np.ndarray:
    height, width, _ = rgb.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return rgb[top : top + side, left : left + side]


def _resize(rgb: np.ndarray, side_pixels: int, *, is_flipped: bool) -> np.ndarray:
    rgb = np.ascontiguousarray(rgb)
    if rgb.shape[:2] == (side_pixels, side_pixels) and not is_flipped:
        return rgb
    # Torch refuses to wrap the read-only arrays that Pillow hands out.
    writeable = rgb if rgb.flags.writeable else rgb.copy()
    # NOTE: in this order the strides are those of channels-last, and the kernel takes the pixels as
    # they lie. With `permute(2, 0, 1)[None]` it splits them into planes first: half as fast.
    channels_last = torch.from_numpy(writeable)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(
        channels_last, size=(side_pixels, side_pixels), mode="bicubic", antialias=True
    )
    if is_flipped:
        resized = resized.flip(3)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())
