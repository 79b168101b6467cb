"""The page: all in one file, every number of it in the CSV, and pictures that are drawn."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from nmm.log import JsonLog
from nmm.plot.scaling import log_axes
from nmm.scaling.__main__ import main
from nmm.scaling.laws import CHINCHILLA, INTERACTION, SPARSE
from nmm.scaling.mixed import mean_alone
from nmm.scaling.mixtures import SHARE, MixtureLaw, best_shares
from nmm.scaling.pieces import parameters_table
from nmm.scaling.points import Points
from nmm.scaling.repeated import RepeatedLaw
from nmm.scaling.report import read_study
from nmm.scaling.words import table as fit_table
from tests.scaling_cases import NMM, SIZES, design, planted
from tests.test_scaling_cli import rows_of, write_table
from tests.test_scaling_phenomena import taking_turns
from tests.test_scaling_planted import DOMAINS, MIXED, mixtures
from tests.test_scaling_runs import write_run
from tests.test_scaling_solve import REPEATED_TRUTH, SPARSE_TRUTH

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


def test_the_page_says_where_a_best_split_is_outside_of_the_runs(study: Path) -> None:
    """Its N and D grow from 1.2e8 and 7e9 at the first C to 6e9 and 3e11 at the third."""
    (early,) = read_study([("early", study / "early")]).chapters
    among = early.picture.is_among_runs(np.array([5e18, 1e20, 1e22, 1e23]))
    assert among.tolist() == [False, True, False, False]
    words = Page((study / "out" / "report.html").read_text()).words
    assert words.count("(extrapolated)") == 4  # both families at both ends
    assert "2 fits." in words


def test_an_e_of_nothing_is_printed_as_0(study: Path) -> None:
    """For people; files keep what the search found."""
    record = json.loads((study / "early" / "fit.json").read_text())
    record["parameters"]["E"], record["intervals"]["E"] = 2e-9, [1e-9, 1.5]
    assert "<td>E</td><td>0</td><td>0 to 1.5</td>" in parameters_table({"": record}, printed={})
    assert re.search(r"\n  E +0   \[0, 1\.5\]\n", fit_table(record, title=""))


@pytest.mark.parametrize(
    ("low", "high"), [(6.0, 6.2), (4.7, 6.6), (2.1, 3.1), (0.2, 1.6), (0.1, 1.2), (0.3, 20)]
)
def test_axes_of_losses_have_numbers(low: float, high: float) -> None:
    axes = Figure().subplots()
    axes.plot([1e12, 1e13], [low, high])
    log_axes(axes, x=True, y=True)
    axes.figure.draw_without_rendering()
    shown = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks()]
    assert sum(bool(text) and low <= float(text) <= high for text in shown) >= 3


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


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every law but the chinchilla law, a pair, and what the logs of its runs show."""
    directory = tmp_path_factory.mktemp("others")
    law = MixtureLaw(DOMAINS)
    losses = [
        planted(law, truth, columns=mixtures(), noise=1e-3, seed=seed).loss
        for seed, truth in enumerate((MIXED, MIXED | {"C_caption": 0.3, "C_text": 1.4}))
    ]
    rows = [
        {**row, "text": float(losses[0][i]), "caption": float(losses[1][i])}
        for i, row in enumerate(rows_of(Points(mixtures(), losses[0])))
    ]
    spec = [f"{SHARE}{name}={SHARE}{name}" for name in DOMAINS]
    spec += ["L/text=text", "L/caption=caption"]
    columns = ["--columns", ",".join(spec)]
    flags = ["--law", "mixture", "--weights", "text=2,caption=1", "--bootstrap", "10"]
    table = write_table(directory / "m.csv", rows)
    main(["fit", *table, *columns, *flags, "--out", str(directory / "mixture")])
    sparse = design(N=SIZES[::2], D=np.geomspace(2.5e9, 6e11, 4), S=np.array([0, 0.5, 0.75, 0.875]))
    sparse["keep"] = 1 - sparse["S"]
    repeated = design(
        N=np.geomspace(3e7, 8e9, 5), U=np.array([4e9]), passes=np.array([0.3, 1, 2, 5, 12, 30, 70])
    )
    repeated["D"] = repeated.pop("passes") * repeated["U"]
    for name, one, truth, points in (
        ("sparse", SPARSE, SPARSE_TRUTH, sparse),
        ("repeated", RepeatedLaw(), REPEATED_TRUTH, repeated),
    ):
        table = rows_of(planted(one, truth, columns=points, noise=1e-3))
        table = write_table(directory / f"{name}.csv", table)
        main(["fit", *table, "--law", name, "--out", str(directory / name)])
    main(
        ["fit-mixed", *pair_table(directory), "--bootstrap", "20", "--out", str(directory / "pair")]
    )
    runs = [*("--runs", str(write_dynamics(directory))), "--pair", "text,image", "--window", "25"]
    main(["phenomena", *runs, "--out", str(directory / "pair")])
    fits = [f"{name}={directory / name}" for name in ("mixture", "sparse", "repeated", "pair")]
    main(["report", "--fit", *fits, "--out", str(directory / "out")])
    return directory


def test_other_laws_pairs_and_phenomena_have_their_sections(others: Path) -> None:
    page = Page((others / "out" / "report.html").read_text())
    assert page.opened == []
    for words in (
        "Best mixtures",
        "all (text x 0.667, caption x 0.333)",
        "sparse: sparse law",
        "in print: arXiv 2504.07951, table 12",
        "in print: arXiv 2305.16264",
        "pair: text and image in one model",
        "synergy begins, at the cheapest, at",
        "in print: speech and text",
        "how training on two modalities goes",
        "best tokens per step",
    ):
        assert words in page.words, words
    figures = others / "out" / "figures"
    names = sorted(path.stem.split("_", 1)[1] for path in figures.glob("*.png"))
    assert names == sorted(
        ["shares", "triangle", "sparsity", "repetition", "interaction", "barrier", "dynamics"]
        + ["batches"]
        + ["residuals"] * 6
    )
    for path in figures.glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 10, path.name


def test_numbers_of_other_sections_are_in_the_table(others: Path) -> None:
    with (others / "out" / "report.csv").open(newline="") as lines:
        rows = {(row["fit"], row["quantity"]): row for row in csv.DictReader(lines)}
    fit = json.loads((others / "mixture" / "fit.json").read_text())
    best = fit["best_mixtures"][""]
    for domain in DOMAINS:
        row = rows["mixture: all losses", domain]
        assert float(row["value"]) == best["shares"][domain]
        assert float(row["low"]) == best["intervals"][domain][0]
    shares, loss = best_shares(
        [
            (MixtureLaw(DOMAINS), fit["losses"][f"loss/kind/{k}"]["parameters"])
            for k in best["weights"]
        ],
        size=best["N"],
        tokens=best["D"],
        weights=[2 / 3, 1 / 3],
    )
    assert best["shares"] == pytest.approx(shares, abs=1e-6)
    assert best["loss"] == pytest.approx(loss)
    pair = json.loads((others / "pair" / "fit_mixed.json").read_text())
    assert float(rows["pair: text and image", "C"]["value"]) == pair["parameters"]["C"]
    assert float(rows["pair: text and image, barrier", "size"]["value"]) == pair["barrier"]["size"]
    assert (
        float(rows["pair: text alone", "alpha"]["value"]) == pair["alone"][0]["parameters"]["alpha"]
    )
    seen = json.loads((others / "pair" / "phenomena.json").read_text())["pairs"][0]
    rho = rows["pair: text,image", "rho of paused"]
    assert float(rho["value"]) == seen["with_N"]["paused"]["rho"]


def write_dynamics(folder: Path) -> Path:
    """Runs whose modalities take turns, the larger the less, and a scan of batches."""
    for place, size in enumerate((1e8, 1e9, 1e10)):
        write_taking_turns(folder / "runs" / str(place), size=size, rows=100 - 25 * place)
    for steps in (25, 50, 100, 200):
        directory = write_taking_turns(folder / "runs" / f"scan{steps}", size=2e9, rows=60)
        manifest = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").write_text(json.dumps({**manifest, "total_steps": steps}))
        loss = 3 + 0.02 * np.log(steps / 60) ** 2
        end = {"tokens": 10**10, "flops": 6e19, "loss": loss}
        log = JsonLog(directory / "evals.jsonl", keep_until_step=0)
        log.write({"step": 200, **end})
        log.close()
    return folder / "runs"


def write_taking_turns(directory: Path, *, size: float, rows: int) -> Path:
    write_run(directory, size=size)
    (directory / "losses.jsonl").unlink()
    turns = taking_turns(turns=2, rows=rows)
    both = {"loss/modality/text": 4.0, "loss/modality/image": 4.0}
    turns += [{**turns[-1], **{key: v - i / 100 for key, v in both.items()}} for i in range(200)]
    log = JsonLog(directory / "losses.jsonl", keep_until_step=0)
    for number, row in enumerate(turns, start=1):
        log.write({**row, "step": number, "grad_norm": 9.0 if number % 150 == 149 else 1.0})
    log.write({**turns[-1], "step": 10**6, "tokens": 10**10, "flops": 6e19})
    log.close()
    return directory


def pair_table(folder: Path) -> list[str]:
    """Flags of a table of text and image, alone and together."""
    alone = (
        {"E": 2.0, "A": 150.0, "alpha": 0.28, "B": 900.0, "beta": 0.30},
        {"E": 2.6, "A": 90.0, "alpha": 0.25, "B": 300.0, "beta": 0.25},
    )
    truth = {"C": 0.15, "A": 60.0, "alpha": 0.30, "B": 120.0, "beta": 0.28}
    columns = design(N=np.geomspace(8e7, 6.7e9, 5), D=np.geomspace(5e9, 1e11, 4))
    half = columns["D"] / 2
    both = Points({"N": columns["N"], "D_i": half, "D_j": half}, np.ones(20))
    joint = INTERACTION.predict(truth, columns=columns, offset=mean_alone(alone, both))
    rows: list[dict[str, object]] = []
    for side, law in enumerate(alone):
        points = planted(CHINCHILLA, law, columns=columns, noise=1e-3, seed=side)
        for n, d, loss in zip(columns["N"], columns["D"], points.loss, strict=True):
            row = {"N": n, "D_i": 0.0, "D_j": 0.0, "L_i": "", "L_j": ""}
            rows.append({**row, "D_" + "ij"[side]: d, "L_" + "ij"[side]: loss})
    noise = np.exp(1e-3 * np.random.default_rng(2).normal(size=20))
    for n, d, loss in zip(columns["N"], half, joint * noise, strict=True):
        rows.append({"N": n, "D_i": d, "D_j": d, "L_i": loss - 0.2, "L_j": loss + 0.2})
    return [*write_table(folder / "pair.csv", rows), "--pair", "text,image"]


def test_a_directory_without_results_is_refused(study: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "fit_mixed.json").write_text("{")
    for name, words in (
        ("empty", "which has no fit.json, fit_mixed.json"),
        ("torn", "no readable"),
    ):
        fits = [str(study / "late"), str(tmp_path / name)]
        with pytest.raises(SystemExit, match=words):
            main(["report", "--fit", *fits, "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
