"""Scenes of coloured shapes: choosing one, rendering it as a JPEG, and saying what it shows.

A scene holds one or two groups of equal objects on a background. Two groups lie one above the other
or side by side, so a caption names shape, colour, count, relation and background, and each of these
words can only be known from the pixels.
"""

import hashlib
import io
import re
from dataclasses import asdict, dataclass
from enum import Enum
from functools import lru_cache
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageDraw

SIDE = 64  # pixels of a picture's side
COLOURS = {
    "red": (214, 24, 36),
    "green": (18, 150, 52),
    "blue": (28, 72, 226),
    "yellow": (250, 206, 0),
    "pink": (255, 112, 200),
    "cyan": (0, 196, 216),
}
# Name -> plural. No full circle: at this size only its corners tell it from a square, which a small
# model learns slowly.
SHAPES = {
    "ring": "rings",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}
BACKGROUNDS = ("light", "dark", "striped")
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
HELD_OUT_ONE_IN = 8

ALONE = (
    "There {are} {group} on a {background} background.",
    "The picture shows {group} on a {background} background.",
    "On a {background} background there {are} {group}.",
)
PAIR = (
    "There {are} {group} {relation} {other} on a {background} background.",
    "The picture shows {group} {relation} {other} on a {background} background.",
    "On a {background} background {group} {are} {relation} {other}.",
)


class Axis(Enum):
    """How two groups lie; the value is the relation of the first to the second, and its inverse."""

    vertical = ("above", "below")
    horizontal = ("to the left of", "to the right of")


@dataclass(frozen=True)
class Group:
    """`count` objects of one shape and colour."""

    count: int
    colour: str
    shape: str

    def noun(self) -> str:
        """Colour and shape, as in "red ring" or "red rings"."""
        return f"{self.colour} {self.shape if self.count == 1 else SHAPES[self.shape]}"

    def indefinite(self) -> str:
        """As in "a red ring" or "two red rings"."""
        return f"{COUNTS[self.count]} {self.noun()}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows, without sizes and tones. The first group is above, or to the left."""

    groups: tuple[Group, ...]
    axis: Axis
    background: str

    @property
    def held_out(self) -> bool:
        """Does the scene belong to the held-out split? Decided by its content, not the seed."""
        content = f"{self.groups} {self.axis.name if self.groups[1:] else ''} {self.background}"
        return hashlib.sha256(content.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True)
class Placed:
    """One object in the picture: left, top and size in pixels."""

    shape: str
    colour: str
    left: int
    top: int
    size: int


def words_named_in(caption: str) -> set[str]:
    """The colour and shape words of a text, plural folded to singular."""
    singular = {plural: shape for shape, plural in SHAPES.items()}
    words = [singular.get(word, word) for word in re.findall(r"[a-z]+", caption.lower())]
    return {*COLOURS, *SHAPES}.intersection(words)


def words_true_of(scene: dict) -> set[str]:
    """The colour and shape words that name something in a picture; `scene` is stored beside it."""
    return {word for thing in scene["objects"] for word in (thing["colour"], thing["shape"])}


def random_scene(rng: Random, *, held_out: bool, pair: bool) -> Scene:
    """A scene of the asked split; `pair` asks for two groups, which differ in colour or shape."""
    while True:
        groups = tuple(random_group(rng, most=2 if pair else 4) for _ in range(2 if pair else 1))
        scene = Scene(groups, axis=rng.choice(list(Axis)), background=rng.choice(BACKGROUNDS))
        if scene.held_out == held_out and unambiguous(scene):
            return scene


def random_group(rng: Random, *, most: int) -> Group:
    """A group of at most `most` objects."""
    return Group(
        rng.randint(1, most), colour=rng.choice(list(COLOURS)), shape=rng.choice(list(SHAPES))
    )


def unambiguous(scene: Scene) -> bool:
    """May the groups be told apart by colour and shape?"""
    return len({(group.colour, group.shape) for group in scene.groups}) == len(scene.groups)


def caption(rng: Random, scene: Scene) -> str:
    """One sentence of 8 to 18 words on a scene, in one of three phrasings."""
    words = {"group": scene.groups[0].indefinite(), "background": scene.background}
    words["are"] = "is" if scene.groups[0].count == 1 else "are"
    if len(scene.groups) == 1:
        return rng.choice(ALONE).format(**words)
    other = scene.groups[1].indefinite()
    return rng.choice(PAIR).format(relation=scene.axis.value[0], other=other, **words)


def place(rng: Random, scene: Scene) -> list[Placed]:
    """Where the objects lie: in a 2 x 2 grid, one alone halfway; sizes vary.

    Two red rings above a blue square, and a red ring to the left of two blue squares:

        R R         B
         B        R
                    B
    """
    if len(scene.groups) == 1:
        group = scene.groups[0]
        cells = [(16, 16), (48, 16), (16, 48), (48, 48)]
        centres = [(32, 32)] if group.count == 1 else sorted(rng.sample(cells, group.count))
        return [_sized(rng, group, centre=centre) for centre in centres]
    placed = []
    for group, across in zip(scene.groups, (16, 48), strict=True):
        for along in (32,) if group.count == 1 else (16, 48):
            centre = (along, across) if scene.axis is Axis.vertical else (across, along)
            placed.append(_sized(rng, group, centre=centre))
    return placed


def _sized(rng: Random, group: Group, *, centre: tuple[int, int]) -> Placed:
    """An object of random size. Places are fixed: shapes that move freely take longer to learn."""
    size = rng.randint(22, 28)
    left, top = (c - size // 2 for c in centre)
    return Placed(group.shape, group.colour, left=left, top=top, size=size)


def render(rng: Random, scene: Scene) -> tuple[bytes, dict]:
    """A scene as a JPEG of SIDE x SIDE pixels, and what it shows, as kept beside it."""
    placed = place(rng, scene)
    picture = _background(scene.background, rng.randrange(8)).copy()
    for thing in placed:
        picture.paste(
            COLOURS[thing.colour], (thing.left, thing.top), _mask(thing.shape, thing.size)
        )
    file = io.BytesIO()
    # subsampling=0: JPEG's default halves the resolution of colour, which blurs small shapes.
    picture.save(file, "JPEG", quality=90, subsampling=0)
    described = {
        "objects": [asdict(thing) for thing in placed],
        "groups": [asdict(group) for group in scene.groups],
        "axis": scene.axis.name if scene.groups[1:] else None,
        "background": scene.background,
    }
    return file.getvalue(), described


@lru_cache
def _background(name: str, tone: int) -> Image.Image:
    """Grey, in one of eight tones, brighter towards the top; stripes are slanted."""
    picture = Image.new("RGB", (SIDE, SIDE))
    for y in range(SIDE):
        for x in range(SIDE):
            grey = {"light": 244, "dark": 58, "striped": 158 if (x + y) % 16 < 8 else 198}[name]
            grey -= 3 * tone + y // 4
            picture.putpixel((x, y), (grey, grey, min(255, grey + 6)))
    return picture


@lru_cache(maxsize=256)
def _mask(shape: str, size: int) -> Image.Image:
    """Coverage of each pixel by a shape, from a drawing eight times as fine."""
    fine = 8 * size
    mask = Image.new("L", (fine, fine))
    draw = ImageDraw.Draw(mask)
    if shape == "ring":
        draw.ellipse((0, 0, fine - 1, fine - 1), fill=255)
        draw.ellipse((fine // 4, fine // 4, fine - 1 - fine // 4, fine - 1 - fine // 4), fill=0)
    else:
        draw.polygon([(x * (fine - 1), y * (fine - 1)) for x, y in _outline(shape)], fill=255)
    return mask.reduce(8)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners in the unit square, y down."""
    match shape:
        case "square":
            return [(0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)]
        case "triangle":
            return [(0.5, 0.02), (1, 0.96), (0, 0.96)]
        case "cross":
            a, b = 0.34, 0.66
            upper = [(a, a), (a, 0), (b, 0), (b, a), (1, a), (1, b)]
            return upper + [(1 - x, 1 - y) for x, y in upper]
        case "star":
            radii = (0.54, 0.22)
            spokes = [(radii[i % 2], i * pi / 5) for i in range(10)]
            return [(0.5 + r * sin(turn), 0.54 - r * cos(turn)) for r, turn in spokes]
    raise AssertionError(shape)
