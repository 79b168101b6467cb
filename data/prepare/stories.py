"""Stories in pictures: each picture of a document changes one thing, the text says which."""

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import TypeVar

from data.prepare.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Axis,
    Group,
    Scene,
    random_scene,
    render,
    unambiguous,
)

T = TypeVar("T")
NUMBERS = {2: "two", 3: "three", 4: "four"}


def story(rng: Random, *, held_out: bool) -> tuple[list[str | bytes], list[Scene]]:
    """Texts and pictures in reading order, and the scenes; every scene belongs to the asked split.

    A sentence follows its picture, because that is what it must be read from:

        "A story in three pictures."
        PICTURE  "The first picture shows a red ring above a blue square on a dark background."
        PICTURE  "In the next picture the red ring has moved to the left of the blue square."
        PICTURE  "In the last picture the blue square has turned green and is still ..."
    """
    pictures = rng.randint(2, 4)
    while (changes := _changes(rng, pictures - 1, held_out=held_out)) is None:
        pass
    opening, *later = changes
    parts: list[str | bytes] = [f"A story in {NUMBERS[pictures]} pictures."]
    parts += [render(rng, opening[0])[0], f"The first picture shows {opening[1]}."]
    for index, (scene, event) in enumerate(later):
        which = "last" if index == len(later) - 1 else "next"
        parts += [render(rng, scene)[0], f"In the {which} picture {event}."]
    return parts, [scene for scene, _ in changes]


def _changes(rng: Random, count: int, *, held_out: bool) -> list[tuple[Scene, str]] | None:
    """A scene and `count` changes, each with its clause; None where a change would leave the split.

    A scene has some 30 neighbours, so a few have none in the smaller split.
    """
    scene = random_scene(rng, held_out=held_out, pair=True)
    first, second = (group.indefinite() for group in scene.groups)
    relation = scene.axis.value[0]
    changes = [(scene, f"{first} {relation} {second} on a {scene.background} background")]
    while len(changes) <= count:
        tried = (change(rng, changes[-1][0]) for _ in range(100))
        fitting = (new for new in tried if new[0].held_out == held_out and unambiguous(new[0]))
        found = next(fitting, None)
        if found is None:
            return None
        changes.append(found)
    return changes


def change(rng: Random, scene: Scene) -> tuple[Scene, str]:
    """The scene after one event, and the event as a clause about what the next picture shows."""
    if rng.random() < 0.3:
        return _move(rng, scene)
    if rng.random() < 0.2:
        background = _other(rng, BACKGROUNDS, than=scene.background)
        first, second = (_definite(group) for group in scene.groups)
        event = f"the background has turned {background} behind {first} and {second}"
        return replace(scene, background=background), event
    which = rng.randrange(2)
    before, bystander = scene.groups[which], scene.groups[1 - which]
    after, event = _transform(rng, before)
    groups = (after, bystander) if which == 0 else (bystander, after)
    return replace(
        scene, groups=groups
    ), f"{event} {scene.axis.value[which]} {_definite(bystander)}"


def _move(rng: Random, scene: Scene) -> tuple[Scene, str]:
    """The first group goes to another side of the second."""
    first, second = scene.groups
    axis, side = _other(
        rng, [(axis, side) for axis in Axis for side in range(2)], than=(scene.axis, 0)
    )
    event = f"{_definite(first)} {_has(first)} moved {axis.value[side]} {_definite(second)}"
    return replace(
        scene, axis=axis, groups=(first, second) if side == 0 else (second, first)
    ), event


def _transform(rng: Random, group: Group) -> tuple[Group, str]:
    """Another colour, shape or count, and the clause up to the relation."""
    match rng.randrange(3):
        case 0:
            after = replace(group, colour=_other(rng, COLOURS, than=group.colour))
            stays = "is" if group.count == 1 else "are"
            return (
                after,
                f"{_definite(group)} {_has(group)} turned {after.colour} and {stays} still",
            )
        case 1:
            after = replace(group, shape=_other(rng, SHAPES, than=group.shape))
            return after, f"{_definite(group)} {_has(group)} become {after.indefinite()}"
        case _:
            after = replace(group, count=3 - group.count)
            now = "there is only one" if after.count == 1 else "there are now two"
            return after, f"{now} {after.noun()}"


def _definite(group: Group) -> str:
    return f"the {'two ' if group.count == 2 else ''}{group.noun()}"


def _has(group: Group) -> str:
    return "has" if group.count == 1 else "have"


def _other(rng: Random, choices: Iterable[T], *, than: T) -> T:
    return rng.choice([choice for choice in choices if choice != than])
