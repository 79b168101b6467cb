"""The page: all in one file, every number of it in the CSV, and pictures that are drawn."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nmm.scaling.__main__ import main
from nmm.scaling.laws import CHINCHILLA
from tests.scaling_cases import NMM, SIZES, design, planted
from tests.test_scaling_cli import rows_of, write_table

LATE = NMM | {"E": 1.95, "A": 300.0}


class Page(HTMLParser):
    """Words, pictures and tags that were opened and not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.pictures, self.opened = "", [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")
        if tag not in ("img", "meta"):
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two families; one with intervals, a held-out rule and a dropped point."""
    directory = tmp_path_factory.mktemp("report")
    columns = design(N=SIZES, D=np.geomspace(2.5e9, 6e11, 6))
    for name, truth, flags in (
        ("early", NMM, ["--bootstrap", "100", "--holdout", "N>3e9", "--drop-highest", "1"]),
        ("late", LATE, []),
    ):
        points = planted(CHINCHILLA, truth, columns=columns, noise=0.002)
        table = write_table(directory / f"{name}.csv", rows_of(points))
        main(["fit", *table, *flags, "--out", str(directory / name)])
    fits = [f"early <native>={directory / 'early'}", str(directory / "late")]
    main(["report", "--fit", *fits, "--min-flops", "3e19", "--out", str(directory / "out")])
    return directory


def test_the_page_needs_nothing_but_itself(study: Path) -> None:
    text = (study / "out" / "report.html").read_text()
    page = Page(text)
    assert page.opened == []
    assert len(page.pictures) == 1 + 2 * 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.pictures)
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "early <native>: loss" in page.words
    assert "in print: early, 45-45-10" in page.words
    assert "Left out on request: row 1." in page.words
    assert "held out (N>3e9)" in page.words


def test_every_number_is_in_the_table(study: Path) -> None:
    with (study / "out" / "report.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for name, title in (("early", "early <native>: loss"), ("late", "late: loss")):
        record = json.loads((study / name / "fit.json").read_text())
        found = {row["quantity"]: row for row in rows if row["fit"] == title}
        for quantity, value in {**record["parameters"], **record["exponents"]}.items():
            assert float(found[quantity]["value"]) == value
        assert float(found["objective"]["value"]) == record["objective"]
        assert float(found["held out mse"]["value"]) == record["holdout"]["metrics"]["mse"]
        assert float(found["regression a"]["value"]) == record["regression"]["a"]
        if name == "early":
            assert float(found["alpha"]["low"]) == record["intervals"]["alpha"][0]
            assert float(found["a"]["high"]) == record["intervals"]["a"][1]


def test_pictures_are_drawn_in_both_forms(study: Path) -> None:
    figures = study / "out" / "figures"
    vectors = sorted(path.stem for path in figures.glob("*.svg"))
    assert vectors == sorted(path.stem for path in figures.glob("*.png"))
    assert len(vectors) == 11
    for name in vectors:
        with Image.open(figures / f"{name}.png") as picture:
            shades = np.asarray(picture.convert("L"))
        assert shades.std() > 10, name
        svg = (figures / f"{name}.svg").read_text()
        assert "<svg" in svg
        assert ">nan<" not in svg


def test_held_out_points_were_predicted_unseen(study: Path) -> None:
    """points.csv has for every point both predictions, where there are two."""
    with (study / "early" / "points.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 35
    held_out = [row for row in rows if row["predicted_unseen"]]
    assert {float(row["N"]) for row in held_out} == {SIZES[-1]}
    assert all(row["predicted"] == row["predicted_unseen"] for row in held_out)
    with (study / "late" / "points.csv").open(newline="") as lines:
        late = [row for row in csv.DictReader(lines) if row["predicted_unseen"]]
    assert {float(row["N"]) for row in late} == {SIZES[-1]}
    assert all(row["predicted"] != row["predicted_unseen"] for row in late)


def test_other_laws_are_refused(study: Path, tmp_path: Path) -> None:
    for name in ("fit.json", "points.csv"):
        (tmp_path / name).write_bytes((study / "late" / name).read_bytes())
    record = json.loads((tmp_path / "fit.json").read_text())
    (tmp_path / "fit.json").write_text(json.dumps({**record, "law": "sparse"}))
    with pytest.raises(SystemExit, match="the report is about chinchilla laws"):
        main(["report", "--fit", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
