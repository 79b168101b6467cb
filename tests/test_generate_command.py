"""`python -m nmm.generate`: prompts in their order, what it writes, and what it refuses."""

import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.images import decode
from nmm.generate.__main__ import main
from nmm.generate.page import Result, render
from nmm.generate.prompts import Prompt, of_file, of_options
from nmm.generate.seen import Seen
from nmm.generate.text import Written
from tests import corpora, runs


class Page(HTMLParser):
    """The tags of a page and the text of the elements of each class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        name = (dict(attrs).get("class") or tag).split()[-1]
        if tag not in ("meta", "img"):
            self._open.append(name)
            self.texts.setdefault(name, []).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.jpg and b.jpg, of different colours; what is not a picture; a.jpg cut short."""
    directory = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in "ab":
        (directory / f"{name}.jpg").write_bytes(corpora.jpeg(rng, width=256, height=256))
    (directory / "cut.jpg").write_bytes((directory / "a.jpg").read_bytes()[:-300])
    (directory / "page.jpg").write_text("<html>")
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, because captions go into the run."""
    return shutil.copytree(runs.undisturbed(), tmp_path_factory.mktemp("run") / "whole")


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_texts_and_images_keep_their_order(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options and a line of a file give the same document, and its order matters."""
    a, b = pictures / "a.jpg", pictures / "b.jpg"
    options = ["--prompt", "two ", "--image", a, "--prompt", " green", "--image", b]
    found = said(capsys, "--run", run, *options, "--max-tokens", 8, "--out", tmp_path)
    assert found.startswith("two [a.jpg] green[b.jpg]")
    (row,) = map(json.loads, (tmp_path / "generated.jsonl").read_text().splitlines())
    assert row["texts"] == ["two ", None, " green", None]
    assert row["images"] == [None, str(a), None, str(b)]
    assert found.splitlines()[0] == f"two [a.jpg] green[b.jpg]{row['written']}".splitlines()[0]
    prompt = of_options(["two ", a, " green", b])
    again = of_file(tmp_path / "generated.jsonl")  # what it writes is a prompts file too
    assert [(p.parts, p.images) for p in again] == [(prompt.parts, prompt.images)]
    assert of_options(["two ", b, " green", a]).parts != prompt.parts


def test_samples_differ_and_come_again(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"texts": ["two green"], "images": [None]},
        {"texts": [None, "a\u2028b"], "images": ["a.jpg", None]},
    ]
    file = pictures / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    drawn = ("--temperature", 1.5, "--top-p", 0.9, "--samples", 3)
    given = ("--run", run, "--prompts", file, "--max-tokens", 6, *drawn, "--out", tmp_path)
    first = said(capsys, *given)
    assert said(capsys, *given, "--batch", 1) == first
    assert said(capsys, *given, "--seed", 1) != first
    assert re.findall(r"^== (.*)", first, re.MULTILINE) == [
        f"{line}, sample {n}" for line in (1, 2) for n in (1, 2, 3)
    ]
    rows = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    assert len({row["written"] for row in rows}) == 6


def test_captions_of_held_out_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into the run, or where one says; the pages hold what the lines hold."""
    assert "captioned 3 held-out" in said(capsys, "--run", run, "--held-out", 3, "--max-tokens", 4)
    said(capsys, "--run", run, "--held-out", 3, "--max-tokens", 4, "--out", tmp_path / "a" / "b")
    captions = [json.loads(line) for line in (run / "captions.jsonl").read_text().splitlines()]
    assert len(captions) == len({caption["key"] for caption in captions}) == 3
    assert all(
        {*caption["reference"].strip(".").split()} <= {*corpora.WORDS} for caption in captions
    )
    for form in ("jsonl", "html"):
        there = tmp_path / "a" / "b" / f"captions.{form}"
        assert there.read_bytes() == (run / f"captions.{form}").read_bytes()
    with Image.open(run / "captions.png") as picture:
        assert picture.size == (1280, 330)
    drawn = ("--temperature", 1, "--samples", 2, "--out", tmp_path / "c")
    said(capsys, "--run", run, "--held-out", 3, "--max-tokens", 4, *drawn)
    sampled = (tmp_path / "c" / "captions.jsonl").read_text().splitlines()
    assert [json.loads(line)["reference"] for line in sampled] == [
        caption["reference"] for caption in captions for _ in range(2)
    ]
    page = Page((run / "captions.html").read_text())
    assert page.texts["reference"] == [caption["reference"] for caption in captions]
    assert page.texts["h2"] == [caption["key"] for caption in captions]
    assert [*page.texts["h1"]] == [f"whole, step {runs.STEPS}"]


def test_the_page_needs_no_other_file_and_runs_nothing(pictures: Path) -> None:
    """Pictures are those of the model, to the bit; texts are texts, whatever they hold."""
    image = (pictures / "a.jpg").read_bytes()
    evil = "<script>alert(1)</script> & \u0000 \" ' $x$"
    results = [
        Result(Prompt(evil, [evil, image], ["a.jpg"]), evil, Written([evil], ended=False)),
        Result(Prompt("2", [], []), None, Written(["short"], ended=True)),
    ]
    seen = Seen(corpora.IMAGE)
    html = render(results, title=evil, said=evil, seen=seen)
    page = Page(html)
    assert {tag for tag, _ in page.tags} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "main", "article"),
        *("div", "img", "span"),
    }
    (source,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert source is not None
    assert re.findall(r'(?:src|href)="(?!data:)|url\(|@import', html) == []
    assert page.texts["prompt"] == page.texts["reference"] == [evil]
    assert page.texts["written"] == [evil, "short"]
    assert page.texts["more"] == [" …"]
    with Image.open(BytesIO(b64decode(source.partition(",")[2]))) as shown:
        assert np.array_equal(np.asarray(shown), decode(image, 16))
    assert html == render(results, title=evil, said=evil, seen=seen)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["--prompt", "a", "--run", "NONE"],
            r"none/config.yaml does not exist; give the directory",
        ),
        (["--prompt", "a", "--run", "UNTRAINED"], r"untrained has no complete checkpoint; train"),
        (["--prompt", "a", "--run", "RUN", "--step", "7"], r"--step is 7 but .* steps 295, 300;"),
        (["--run", "RUN"], r"nothing to continue; give --image and --prompt, --prompts or"),
        (["--run", "RUN", "--held-out", "0"], r"--held-out is 0; give 1 or more"),
        (["--run", "RUN", "--held-out", "2", "--prompt", "a"], r"three ways to say what"),
        (["--run", "RUN", "--prompts", "FILE", "--image", "CUT"], r"three ways to say what"),
        (["--run", "RUN", "--image", "NONE"], r"--image \S+none cannot be read \(No such file"),
        (["--run", "RUN", "--image", "FOLDER"], r"--image \S+ cannot be read \(Is a directory"),
        (["--run", "RUN", "--image", "PAGE"], r"--image \S+page.jpg cannot be decoded \(\w+\)"),
        (["--run", "RUN", "--image", "CUT"], r"--image \S+cut.jpg cannot be decoded \(\w+\)"),
        (["--run", "RUN", "--image", "PAGE\0"], r"--image .* cannot be read \(embedded null byte"),
        (["--run", "RUN", "--prompt", "\udcff"], r"--prompt is not valid text"),
        (["--run", "RUN", "--prompt", "a", "--max-tokens", "0"], r"--max-tokens is 0; give 1"),
        (
            ["--run", "RUN", "--prompt", "a", "--max-tokens", "63"],
            r"prompt 1 has 3 tokens and .*64",
        ),
        (["--run", "RUN", "--held-out", "1", "--max-tokens", "48"], r"prompt 1 has 17 tokens and"),
        (["--run", "RUN", "--prompt", "a", "--samples", "0"], r"--samples is 0; give 1 or more"),
        (["--run", "RUN", "--prompt", "a", "--samples", "2"], r"--samples is 2 but --temperature"),
        (["--run", "RUN", "--prompt", "a", "--batch", "0"], r"--batch is 0; give 1 or more"),
        (
            ["--run", "RUN", "--prompt", "a", "--temperature", "-1"],
            r"--temperature is -1.0; give 0",
        ),
        (["--run", "RUN", "--prompt", "a", "--temperature", "nan"], r"--temperature is nan; give"),
        (["--run", "RUN", "--prompt", "a", "--top-p", "0"], r"--top-p is 0.0; it is a fraction"),
        (["--run", "RUN", "--prompt", "a", "--top-p", "0.5"], r"--top-p is 0.5 but --temperature"),
        (["--run", "RUN", "--prompt", "a", "--seed", "-1"], r"--seed is -1; set it between 0 and"),
        (["--run", "RUN", "--prompt", "a", "--out", "PAGE"], r"--out is \S+page.jpg, where gener"),
        (["--run", "RUN", "--prompts", "NONE"], r"--prompts \S+none cannot be read \(No such file"),
        (["--run", "RUN", "--prompts", "CUT"], r"--prompts \S+cut.jpg cannot be read \(it is not"),
        (["--run", "RUN", "--prompts", "EMPTY"], r"--prompts \S+empty has no lines; write one"),
        (["--run", "RUN", "--prompts", "PAGE"], r"page.jpg, line 1: is no document \(bad_json\);"),
        (["--run", "RUN", "--prompts", "FILE"], r"lines, line 2: \S+lost.jpg cannot be read \(No"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_a_sentence(
    run: Path, pictures: Path, tmp_path: Path, arguments: list[str], error: str
) -> None:
    (tmp_path / "untrained").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "untrained")
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "lines").write_text(
        '{"texts": ["a"], "images": [null]}\n{"texts": [null], "images": ["lost.jpg"]}\n'
    )
    places = {
        "NONE": tmp_path / "none",
        "UNTRAINED": tmp_path / "untrained",
        "RUN": run,
        "FOLDER": tmp_path,
        "PAGE": pictures / "page.jpg",
        "CUT": pictures / "cut.jpg",
        "EMPTY": tmp_path / "empty",
        "FILE": tmp_path / "lines",
    }
    with pytest.raises(SystemExit, match=f"^error: .*{error}") as refusal:
        main([str(places.get(word, word)) for word in arguments])
    assert "\n" not in str(refusal.value)
