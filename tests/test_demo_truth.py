"""The demo's sentences are true of where the objects lie; with one word swapped they are not."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from random import Random

import numpy as np
import pytest
from PIL import Image

from data.prepare import demo
from data.prepare.scenes import BACKGROUNDS, COLOURS, SHAPES, Group, place
from data.prepare.stories import story
from tests.test_demo_corpus import samples

SINGULAR = {**{shape: shape for shape in SHAPES}, **{SHAPES[shape]: shape for shape in SHAPES}}
COUNT = {"a": 1, "the": 1, "one": 1, "two": 2, "the two": 2, "three": 3, "four": 4}
OPPOSITE = {"above": "below", "to the left of": "to the right of"}
OPPOSITE |= {second: first for first, second in OPPOSITE.items()}

WORDS = r"(the two|the|a|one|two|three|four) ({}) (\w+)".format("|".join(COLOURS))
UNNAMED = WORDS.replace("(", "(?:")
ONE, TWO, WAS = (f"(?P<{name}>{UNNAMED})" for name in ("one", "two", "was"))
LIES = f"(?P<lies>{'|'.join(OPPOSITE)})"
BACK = f"(?P<back>{'|'.join(BACKGROUNDS)})"
COLOUR = f"(?P<colour>{'|'.join(COLOURS)})"
IS, HAS, NEXT = "(?:is|are)", "(?:has|have)", "In the (?:next|last) picture"
SENTENCES = [
    f"There {IS} {ONE}(?: {LIES} {TWO})? on a {BACK} background.",
    f"The (?:first )?picture shows {ONE}(?: {LIES} {TWO})? on a {BACK} background.",
    f"On a {BACK} background there {IS} {ONE}.",
    f"On a {BACK} background {ONE} {IS} {LIES} {TWO}.",
    f"{NEXT} {ONE} {HAS} (?P<moved>moved) {LIES} {TWO}.",
    f"{NEXT} the background has turned {BACK} behind {ONE} and {TWO}.",
    f"{NEXT} {WAS} {HAS} turned {COLOUR} and {IS} still {LIES} {TWO}.",
    f"{NEXT} {WAS} {HAS} become {ONE} {LIES} {TWO}.",
    f"{NEXT} there {IS} (?P<counted>only|now) {ONE} {LIES} {TWO}.",
]


@dataclass(frozen=True)
class Picture:
    """What is drawn: objects with colour, shape, left, top and size; and the background."""

    objects: list[dict]
    background: str

    def groups(self) -> set[Group]:
        counted = Counter((thing["colour"], thing["shape"]) for thing in self.objects)
        return {Group(count, *kind) for kind, count in counted.items()}

    def relation(self, first: Group, second: Group) -> str | None:
        """How all of `first` lie to all of `second`, by their centres; cells are 32 pixels."""
        for edge, before, after in (
            ("top", "above", "below"),
            ("left", "to the left of", "to the right of"),
        ):
            ones, twos = (
                [
                    thing[edge] + thing["size"] / 2
                    for thing in self.objects
                    if (thing["colour"], thing["shape"]) == (group.colour, group.shape)
                ]
                for group in (first, second)
            )
            if min(twos) - max(ones) > 16:
                return before
            if min(ones) - max(twos) > 16:
                return after
        return None


def group(words: str | None) -> Group | None:
    """The group that "two red rings" names; None where noun and number disagree."""
    named = re.fullmatch(WORDS, words or "")
    if named is None:
        return None
    count, colour, noun = named.groups()
    if noun not in SINGULAR or (noun in SHAPES) != (COUNT[count] == 1):
        return None
    return Group(COUNT[count], colour, SINGULAR[noun])


def is_true(sentence: str, now: Picture, before: Picture | None = None) -> bool:
    """Does the sentence tell the groups, relation and background of `now`?

    And with the picture `before` it: does it tell what changed, and did nothing else?
    """
    found = next(filter(None, (re.fullmatch(form, sentence) for form in SENTENCES)), None)
    if found is None:
        return False
    told = {"lies": None, "moved": None, "counted": None, "colour": None, **found.groupdict()}
    one, two, was = (group(told.get(name)) for name in ("one", "two", "was"))
    if told["colour"] and was:
        one = replace(was, colour=told["colour"])
    if one is None or now.groups() != {one, two} - {None}:
        return False
    if told["lies"] and (two is None or now.relation(one, two) != told["lies"]):
        return False
    background = told.get("back")
    if before is None:
        return background == now.background
    if two is None or (background or before.background) != now.background:
        return False
    if told["counted"]:
        was = replace(one, count=3 - one.count)
    was = was or one
    if before.groups() != {was, two} or (background == before.background):
        return False
    return (before.relation(was, two) != now.relation(one, two)) == bool(told["moved"])


def swapped(sentence: str) -> Iterator[str]:
    """The sentence with one colour, count, relation or background in the place of another."""
    things = list(re.finditer(WORDS, sentence))
    for thing in things:
        count, colour, noun = thing.groups()
        start, end = thing.span()
        yield from (
            sentence[:start] + f"{count} {other} {noun}" + sentence[end:]
            for other in COLOURS
            if other != colour
        )
        definite = ("the", "the two") if count.startswith("the") else ("a", "two", "three", "four")
        yield from (
            sentence[:start]
            + f"{other} {colour} {SINGULAR[noun] if COUNT[other] == 1 else SHAPES[SINGULAR[noun]]}"
            + sentence[end:]
            for other in definite
            if COUNT[other] != COUNT[count]
        )
    for words in (OPPOSITE, BACKGROUNDS):
        for word in (word for word in words if word in sentence):
            yield from (sentence.replace(word, other) for other in words if other != word)


def exchanged(sentence: str) -> str:
    """The sentence with its two groups in each other's place."""
    one, two = re.finditer(WORDS, sentence)
    between = sentence[one.end() : two.start()]
    return sentence[: one.start()] + two[0] + between + one[0] + sentence[two.end() :]


def inverted(sentence: str) -> str:
    (relation,) = (words for words in OPPOSITE if words in sentence)
    return sentence.replace(relation, OPPOSITE[relation])


def is_drawn(jpeg: bytes, objects: list[dict]) -> bool:
    """Are the colours of the objects where the objects are, and no other object elsewhere?"""
    pixels = np.asarray(Image.open(BytesIO(jpeg)), dtype=np.int64)
    smallest = 0.2 * 22**2  # pixels of a star
    for name, colour in COLOURS.items():
        near = abs(pixels - colour).max(axis=-1) < 40
        for thing in (thing for thing in objects if thing["colour"] == name):
            rows, columns = (
                slice(thing[edge] - 2, thing[edge] + thing["size"] + 2) for edge in ("top", "left")
            )
            if near[rows, columns].sum() < smallest:
                return False
            near[rows, columns] = False
        if near.sum() > smallest / 2:
            return False
    return True


@pytest.mark.parametrize("split", demo.SPLITS)
def test_captions_tell_counts_and_relations_of_the_picture(
    split: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.getbasetemp() / "demo-truth"
    demo.render(out, size=0.02, seed=0)  # the second time it is there
    relations: set[str] = set()
    lies = 0
    for sample in samples(out, "caption", split):
        caption, scene = sample["txt"].decode(), json.loads(sample["json"])
        picture = Picture(scene["objects"], scene["background"])
        assert is_true(caption, picture), caption
        assert is_drawn(sample["jpg"], scene["objects"])
        assert picture.groups() == {Group(**described) for described in scene["groups"]}
        for lie in swapped(caption):
            assert lie != caption
            assert not is_true(lie, picture), (lie, caption)
            lies += 1
        if len(scene["groups"]) == 2:
            assert not is_true(inverted(caption), picture)
            assert not is_true(exchanged(caption), picture)
            assert is_true(exchanged(inverted(caption)), picture)  # the same, told the other way
            relations.update(words for words in OPPOSITE if words in caption)
    assert relations <= {"above", "to the left of"}  # the first group is above or to the left
    assert lies > 10 * len(samples(out, "caption", split))


@pytest.mark.parametrize("held_out", [False, True])
def test_stories_tell_every_move_and_change_of_the_pictures(held_out: bool) -> None:
    rng = Random(11)
    events: Counter[str] = Counter()
    for _ in range(80):
        (_, *parts), scenes = story(rng, held_out=held_out)
        before = None
        for scene, jpeg, sentence in zip(scenes, parts[::2], parts[1::2], strict=True):
            assert isinstance(jpeg, bytes)
            assert isinstance(sentence, str)
            objects = [asdict(thing) for thing in place(Random(0), scene)]  # sizes differ
            now = Picture(objects, scene.background)
            assert is_drawn(jpeg, objects)
            assert is_true(sentence, now, before), sentence
            for lie in swapped(sentence):
                assert not is_true(lie, now, before), (lie, sentence)
            if before is not None:
                assert not is_true(sentence, before, now), sentence  # told in the wrong order
                words = ("moved", "background", "turned", "become", "there")
                events[next(word for word in words if word in sentence)] += 1
            before = now
    assert len(events) == 5
    assert min(events.values()) >= 5
