"""Random crops and flips: distributed as they should be, and exactly the pixels that they say."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import Box, View, views
from data.images import decode
from nmm.config import AugmentConfig, compose, load
from nmm.errors import UserError
from tests.corpora import encoded, picture

PAPER = AugmentConfig(crop_area_fraction=0.4, flip=True)
PLACE = {"seed": 1, "epoch": 0, "source": 0, "shard": 0, "document": 0}


def by_the_book(
    rng: np.random.Generator, *, height: int, width: int, least: float
) -> tuple[int, int, int, int]:
    """RandomResizedCrop as torchvision documents it, with another generator."""
    for _ in range(10):
        area = height * width * rng.uniform(least, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width", "least"), [(600, 400, 0.4), (300, 330, 0.08)])
def test_crops_are_distributed_as_they_should(height: int, width: int, least: float) -> None:
    """Deciles of area, ratio and place over 6,000 images, against a reference."""
    config = AugmentConfig(crop_area_fraction=least)
    rng = np.random.default_rng(0)
    found, expected = [], []
    for document in range(6000):
        (view,) = views(config, 1, **{**PLACE, "document": document})
        assert view is not None
        box = view.box(height, width)
        assert box is not None
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width
        found.append(box)
        expected.append(by_the_book(rng, height=height, width=width, least=least))
    for measure in (
        lambda top, left, h, w: h * w / (height * width),
        lambda top, left, h, w: math.log(w / h) + 1,
        lambda top, left, h, w: (top + h / 2) / height,
        lambda top, left, h, w: (left + w / 2) / width,
    ):
        deciles = [
            np.quantile([measure(*box) for box in boxes], np.linspace(0, 1, 11))
            for boxes in (found, expected)
        ]
        assert deciles[0] == pytest.approx(deciles[1], abs=0.02)


def test_half_of_the_images_are_flipped_whatever_their_crop() -> None:
    seen = [view for n in range(3000) for view in views(PAPER, 2, **{**PLACE, "document": n})]
    assert len(seen) == 6000
    flips, areas = [], []
    for view in seen:
        assert view is not None
        box = view.box(1000, 1000)
        assert box is not None
        flips.append(view.is_flipped)
        areas.append(box.height * box.width)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(flips, areas)[0, 1]) < 0.04
    assert abs(np.corrcoef(flips[::2], flips[1::2])[0, 1]) < 0.06
    assert not any(View(AugmentConfig(), view.key, 0).is_flipped for view in seen if view)
    assert views(AugmentConfig(), 3, **PLACE) == [None] * 3


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 1000, Box(0, 493, 10, 13)),
        (1000, 10, Box(493, 0, 13, 10)),
        (1, 1, Box(0, 0, 1, 1)),
    ],
)
def test_what_is_too_narrow_for_any_crop_is_cut_in_its_middle(
    height: int, width: int, box: Box
) -> None:
    assert {View(PAPER, key, 0).box(height, width) for key in range(50)} == {box}


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    small = torch.nn.functional.interpolate(
        planes, size=(side, side), mode="bicubic", antialias=True
    )
    return small[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("key", range(12))
def test_a_view_is_the_crop_resized_and_flipped(key: int) -> None:
    """To the bit for a lossless file; a JPEG that the decoder shrinks is near Pillow's crop."""
    view = View(PAPER, key, 0)
    image = picture(np.random.default_rng(key), width=400, height=300, blur=100)
    box = view.box(300, 400)
    assert box is not None
    cut = np.asarray(image)[box.top : box.top + box.height, box.left : box.left + box.width]
    expected = resized(cut, 48)[:, :: -1 if view.is_flipped else 1]
    assert np.array_equal(decode(encoded(image, "PNG"), 48, view=view), expected)
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    by_pillow = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC, box=corners))
    by_pillow = by_pillow[:, :: -1 if view.is_flipped else 1].astype(int)
    found = decode(encoded(image, "JPEG", quality=97, subsampling=0), 48, view=view)
    assert found.shape == (48, 48, 3)
    assert np.abs(found - by_pillow).mean() < 3
    whole = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(found - whole).mean() > 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_crop_is_one_of_the_upright_image(orientation: int) -> None:
    """However the camera stored it: the same part of the same picture, but for rounding."""
    image = picture(np.random.default_rng(0), width=360, height=240, blur=60)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = image.transpose(undo[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 97, "subsampling": 0}
    for side, most in ((200, 1), (48, 3)):  # the decoder leaves all pixels, or a quarter
        view = View(PAPER, 5, 0)
        found = decode(encoded(stored, "JPEG", exif=exif, **options), side, view=view)
        expected = decode(encoded(image, "PNG"), side, view=view)
        assert np.abs(found.astype(int) - expected).mean() < most


def test_the_decoder_leaves_as_many_pixels_as_are_asked_for() -> None:
    """A small crop of a fine pattern is not washed out by what the decoder left away."""
    lines = np.zeros((512, 512, 3), np.uint8)
    lines[:, ::4] = lines[:, 1::4] = 255
    data = encoded(Image.fromarray(lines), "JPEG", quality=97, subsampling=0)
    config = AugmentConfig(crop_area_fraction=0.01)
    seen = [(view, view.box(512, 512)) for key in range(200) if (view := View(config, key, 0))]
    small = [view for view, box in seen if box and max(box.height, box.width) < 128]
    assert len(small) > 5
    for view in small:
        assert decode(data, 128, view=view).astype(float).std() > 80


def test_flips_alone_mirror_the_centre_square() -> None:
    """What is decoded without augmentation, from either side."""
    data = encoded(picture(np.random.default_rng(0), width=90, height=60), "JPEG")
    plain, seen = decode(data, 32), []
    for key in range(20):
        view = View(AugmentConfig(flip=True), key, 0)
        found = decode(data, 32, view=view)
        assert np.array_equal(found, plain[:, ::-1] if view.is_flipped else plain)
        assert found.flags.c_contiguous
        seen.append(view.is_flipped)
    assert 4 < sum(seen) < 16


def test_the_mixtures_of_the_paper_are_augmented_as_there() -> None:
    for name in ("mix_45_45_10", "mix_30_30_40"):
        assert load(compose([f"data={name}", "schedule.total_steps=1"])).data.augment == PAPER
    assert load(compose(["schedule.total_steps=1"])).data.augment == AugmentConfig()


@pytest.mark.parametrize("fraction", [0.0, -0.4, 1.5])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"data\.augment\.crop_area_fraction is "):
        AugmentConfig(crop_area_fraction=fraction)
