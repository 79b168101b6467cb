"""Every file becomes the same upright square of RGB pixels, or a named verdict."""

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import MAX_PIXELS, MAX_SCANS, check_header, decode
from data.samples import BadSample

QUADRANTS = np.zeros((16, 16, 3), np.uint8)
QUADRANTS[:8, :8], QUADRANTS[:8, 8:] = (255, 0, 0), (0, 255, 0)
QUADRANTS[8:, :8], QUADRANTS[8:, 8:] = (0, 0, 255), (255, 255, 0)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(int) - expected.astype(int)).mean())


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("RGB", "PNG"),
        ("RGB", "GIF"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
    ],
)
def test_lossless_formats_keep_every_pixel(mode: str, form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(Image.fromarray(QUADRANTS).convert(mode), form, **options)
    assert np.array_equal(decode(data, 16), QUADRANTS)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_jpegs_keep_their_colours(mode: str) -> None:
    data = encoded(Image.fromarray(QUADRANTS).convert(mode), "JPEG", quality=100, subsampling=0)
    assert difference(decode(data, 16), QUADRANTS) < 3


def test_grey_sixteen_bits_and_transparency() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    three = np.repeat(grey[:, :, None], 3, axis=2)
    assert np.array_equal(decode(encoded(Image.fromarray(grey), "PNG"), 16), three)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(decode(encoded(wide, "PNG"), 16), three)
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.array_equal(decode(encoded(clear, "PNG"), 4), np.full((4, 4, 3), 255))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert np.array_equal(
        decode(encoded(palette, "PNG", transparency=0), 4), np.full((4, 4, 3), 255)
    )


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_rotation_is_undone(orientation: int, form: str) -> None:
    """Pillow itself rotates the upright picture into how a camera would have stored it."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(QUADRANTS)
    if orientation > 1:
        stored = stored.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[
        form
    ]
    assert difference(decode(encoded(stored, form, exif=exif, **options), 16), QUADRANTS) < 3


def test_the_centre_square_is_resized_like_pillow() -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 20, 3), np.uint8))
    picture = coarse.resize((200, 120), Image.Resampling.BICUBIC)
    square = picture.crop((40, 0, 160, 120))
    expected = np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC))
    assert difference(decode(encoded(picture, "PNG"), 48), expected) < 0.1
    scaled_by_decoder = decode(encoded(picture, "JPEG", quality=95, subsampling=0), 48)
    assert difference(scaled_by_decoder, expected) < 6


def test_only_the_first_frame_counts() -> None:
    first, second = Image.fromarray(QUADRANTS), Image.new("RGB", (16, 16), "white")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert np.array_equal(decode(data, 16), QUADRANTS)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
def test_tiny_images_are_images(size: tuple[int, int]) -> None:
    assert decode(encoded(Image.new("RGB", size, "red"), "PNG"), 8).shape == (8, 8, 3)


def bomb(width: int, height: int) -> bytes:
    """A PNG that announces width x height pixels and holds none."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c))
        for c in (head, b"IDAT")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("width", [10_001, 100_000])
def test_a_bomb_is_refused_by_its_header(width: int) -> None:
    with pytest.raises(BadSample, match="image_pixels"):
        check_header(bomb(width, MAX_PIXELS // 10_000))
    with pytest.raises(BadSample, match="image_pixels"):
        decode(bomb(width, MAX_PIXELS // 10_000), 16)


def endless_scans(count: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    photo = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scan = photo[photo.rindex(b"\xff\xda") : -2]
    return photo[:-2] + count * scan + photo[-2:]


def test_scans_without_end_are_refused_by_their_number() -> None:
    check_header(endless_scans(100))
    with pytest.raises(BadSample, match="image_scans"):
        check_header(endless_scans(MAX_SCANS))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP"])
def test_half_a_file_is_refused(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), form)
    with pytest.raises(BadSample, match=r"image_(decode|header)"):
        decode(data[: len(data) // 2], 16)
    for start in (b"", data[:4], b"<html></html>"):
        with pytest.raises(BadSample, match="image_header"):
            check_header(start)


@pytest.mark.parametrize(("height", "width", "side"), [(40, 31, 16), (9, 25, 16), (17, 17, 5)])
def test_resizing_gives_the_pixels_of_plain_planes(height: int, width: int, side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    cut = pixels[top : top + square, left : left + square]
    planes = torch.from_numpy(cut.transpose(2, 0, 1).copy())[None]
    resized = torch.nn.functional.interpolate(
        planes, size=(side, side), mode="bicubic", antialias=True
    )
    expected = resized[0].permute(1, 2, 0).numpy()
    assert np.array_equal(decode(encoded(Image.fromarray(pixels), "PNG"), side), expected)


def exif_jpeg(before: bytes = b"") -> bytes:
    """A lying picture whose EXIF data say: turn it; `before` comes between start and EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(QUADRANTS), "JPEG", quality=95, subsampling=0, exif=exif)
    return data[:2] + before + data[2:]


@pytest.mark.parametrize(
    "before", [b"", b"\xff\xfe\x00\x06note", b"\xff\xe2\x80\x00" + bytes(32766)]
)
def test_exif_is_found_behind_other_segments(before: bytes) -> None:
    turned = np.rot90(QUADRANTS, -1)
    assert difference(decode(exif_jpeg(before), 16), turned) < 6
    assert difference(decode(exif_jpeg(before), 16), QUADRANTS) > 60
