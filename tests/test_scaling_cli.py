"""The commands on tables: what they write, and one clear sentence for every bad input."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nmm.scaling.__main__ import main
from nmm.scaling.allocation import optimum
from nmm.scaling.bootstrap import intervals
from nmm.scaling.files import write
from nmm.scaling.laws import CHINCHILLA, INTERACTION, SPARSE
from nmm.scaling.mixed import barrier, mean_alone
from nmm.scaling.mixtures import SHARE, MixtureLaw, best_shares
from nmm.scaling.points import Points
from nmm.scaling.repeated import RepeatedLaw
from tests.scaling_cases import NMM, SIZES, TABLES, chinchilla, design, planted
from tests.test_scaling_planted import DOMAINS, MIXED, mixtures
from tests.test_scaling_solve import SPARSE_TRUTH

EPOCH = ["--table", str(TABLES / "chinchilla.csv"), "--columns"]
EPOCH += ["N=Model Size,C=Training FLOP,L=loss"]
Rows = list[dict[str, object]]


def write_table(path: Path, rows: Rows) -> list[str]:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return ["--table", str(path)]


def rows_of(points: Points) -> Rows:
    columns = {**points.columns, "L": points.loss}
    return [
        {name: repr(float(values[i])) for name, values in columns.items()}
        for i in range(len(points))
    ]


def good() -> Rows:
    columns = design(N=SIZES, D=np.geomspace(2.5e9, 6e11, 4))
    return rows_of(planted(CHINCHILLA, NMM, columns=columns, noise=0.003))


def fitted(tmp_path: Path, *arguments: str) -> dict:
    main(["fit", *arguments, "--out", str(tmp_path / "out")])
    return json.loads((tmp_path / "out" / "fit.json").read_text())


def test_fit_writes_all_that_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--drop-highest", "5", "--bootstrap", "200", "--holdout", "N>5e9"]
    found = fitted(tmp_path, *EPOCH, *asked)
    held_out = chinchilla().columns["N"] > 5e9
    assert found["law"] == "chinchilla"
    assert found["points"] == 240 - held_out.sum()
    assert set(found["parameters"]) == {"E", "A", "B", "alpha", "beta"}
    assert set(found["exponents"]) == {"a", "b", "c", "d"}
    assert set(found["intervals"]) == {*found["parameters"], *found["exponents"]}
    assert set(found["metrics"]) == {"mse", "r2", "mae_percent"}
    assert found["holdout"]["points"] == held_out.sum()
    assert found["holdout"]["metrics"]["mse"] < found["holdout"]["naive_metrics"]["mse"]
    assert found["starts"] == 1764
    assert found["seconds"] > 0
    assert found["excluded"]["points"] == ["row 1", "row 2", "row 3", "row 4", "row 5"]
    assert found["agreement"]["confirmed"]
    said = capsys.readouterr().out
    assert "left out by --drop-highest: row 1, row 2, row 3, row 4, row 5" in said
    assert f"objective {found['objective']:.10e}" in said


def test_the_largest_sizes_are_predicted_without_being_asked(tmp_path: Path) -> None:
    found = fitted(tmp_path, *EPOCH, "--drop-highest", "5")
    assert found["objective"] == pytest.approx(1.018274e-3, rel=1e-6)
    assert found["points"] == 240
    assert found["holdout"]["points"] + found["holdout"]["fitted_points"] == 240
    assert found["holdout"]["points"] >= 12
    assert found["exponents"]["a"] == pytest.approx(found["regression"]["a"], abs=2e-3)
    ratio, exponents = found["tokens_per_parameter"], found["exponents"]
    assert ratio["exponent"] == pytest.approx(exponents["b"] - exponents["a"])
    assert ratio["regression_exponent"] == pytest.approx(ratio["exponent"], abs=4e-3)
    best = optimum(found["parameters"], flops=ratio["flops"])
    assert ratio["at_flops"] == pytest.approx(float(best[1] / best[0]), rel=1e-6)


def test_groups_are_fitted_one_by_one(tmp_path: Path) -> None:
    first = [{**row, "model": "early"} for row in good()]
    second = [{**row, "model": "late", "L": str(float(str(row["L"])) * 1.1)} for row in good()]
    found = fitted(tmp_path, *write_table(tmp_path / "t.csv", first + second), "--group", "model")
    assert found["group"] == "model"
    early, late = found["groups"]["early"], found["groups"]["late"]
    assert late["parameters"]["E"] == pytest.approx(1.1 * early["parameters"]["E"], rel=1e-6)
    assert late["parameters"]["alpha"] == pytest.approx(early["parameters"]["alpha"], rel=1e-6)


def test_other_laws_and_files(tmp_path: Path) -> None:
    """The sparse law from JSON lines with S, a mixture from tab-separated shares."""
    asleep = np.array([0.0, 0.5, 0.75, 0.875])
    columns = design(N=SIZES[::2], D=np.geomspace(2.5e9, 6e11, 4), S=asleep)
    columns["keep"] = 1 - columns["S"]
    points = planted(SPARSE, SPARSE_TRUTH, columns=columns, noise=1e-5)
    rows = [{k: float(str(v)) for k, v in row.items()} for row in rows_of(points)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = fitted(tmp_path, "--table", str(tmp_path / "t.jsonl"), "--law", "sparse")
    assert found["parameters"]["beta"] == pytest.approx(SPARSE_TRUTH["beta"], rel=0.01)
    assert found["parameters"]["delta"] == pytest.approx(SPARSE_TRUTH["delta"], rel=0.1)
    assert found["exponents"] == {}
    points = planted(MixtureLaw(DOMAINS), MIXED, columns=mixtures(), noise=1e-4)
    table = write_table(tmp_path / "t.csv", rows_of(points))
    (tmp_path / "t.tsv").write_text((tmp_path / "t.csv").read_text().replace(",", "\t"))
    spec = ",".join(f"{SHARE}{name}={SHARE}{name}" for name in DOMAINS)
    table = ["--table", str(tmp_path / "t.tsv"), "--columns", spec]
    found = fitted(tmp_path, *table, "--law", "mixture", "--bootstrap", "20")
    assert found["parameters"]["gamma_text"] == pytest.approx(MIXED["gamma_text"], rel=0.02)
    assert found["exponents"]["a"] == pytest.approx(NMM["beta"] / 0.636, rel=0.02)
    (shares, _) = best_shares([(MixtureLaw(DOMAINS), MIXED)], size=1e9, tokens=1e11)
    assert found["best_shares"]["shares"] == pytest.approx(shares, abs=0.01)


def test_repeated_tokens_of_one_corpus(tmp_path: Path) -> None:
    """U is the same everywhere, as for somebody who has one corpus; --columns renames it."""
    truth = {"E": 1.9, "A": 500.0, "alpha": 0.35, "B": 1500.0, "beta": 0.35, "R_D": 15, "R_N": 5}
    columns = design(N=np.geomspace(3e7, 8e9, 6), passes=np.array([0.3, 1, 2, 5, 12, 30, 70]))
    columns["U"] = np.full(42, 4e9)
    columns["D"] = columns.pop("passes") * columns["U"]
    rows = rows_of(planted(RepeatedLaw(), truth, columns=columns, noise=1e-5))
    rows = [{"unique": row.pop("U"), **row} for row in rows]
    table = [*write_table(tmp_path / "t.csv", rows), "--columns", "U=unique"]
    found = fitted(tmp_path, *table, "--law", "repeated")
    assert found["parameters"] == pytest.approx(truth, rel=0.05)
    assert found["agreement"]["confirmed"]


def test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = (
        {"E": 2.0, "A": 150.0, "alpha": 0.28, "B": 900.0, "beta": 0.30},
        {"E": 2.6, "A": 90.0, "alpha": 0.25, "B": 300.0, "beta": 0.25},
    )
    truth = {"C": 0.15, "A": 60.0, "alpha": 0.30, "B": 120.0, "beta": 0.28}
    columns = design(N=np.geomspace(8e6, 6.7e9, 5), D=np.geomspace(5e9, 1e11, 4))
    size, half = columns["N"], columns["D"] / 2
    joint = Points({"N": size, "D_i": half, "D_j": half}, np.ones(20))
    together = INTERACTION.predict(truth, columns=columns, offset=mean_alone(alone, joint))
    rows: Rows = []
    for place in range(20):
        n, d = size[place], columns["D"][place]
        one = {"N": np.array([n]), "D": np.array([d])}
        lone = [float(CHINCHILLA.predict(law, columns=one)[0]) for law in alone]
        rows.append({"N": n, "text": d, "image": 0, "text_loss": lone[0], "image_loss": ""})
        rows.append({"N": n, "text": 0, "image": d, "text_loss": "", "image_loss": lone[1]})
        mean = float(together[place])
        row = {"N": n, "text": d / 2, "image": d / 2, "text_loss": mean - 0.2}
        rows.append({**row, "image_loss": mean + 0.2})
    table = write_table(tmp_path / "t.csv", rows)
    names = "D_i=text,D_j=image,L_i=text_loss,L_j=image_loss"
    main(["fit-mixed", *table, "--columns", names, "--bootstrap", "20", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "fit_mixed.json").read_text())
    assert found["parameters"] == pytest.approx(truth, rel=1e-3)
    expected = barrier(truth)
    assert expected is not None
    assert found["barrier"]["size"] == pytest.approx(expected.size, rel=1e-3)
    assert found["product_form"]["objective"] > 100 * found["objective"]
    assert "synergy from N =" in capsys.readouterr().out


def test_several_losses_of_a_table_are_fitted_with_their_mean(tmp_path: Path) -> None:
    """Two losses that are the law moved up and down: the mean is the law itself."""
    rows = good()
    for row in rows:
        loss = float(str(row.pop("L")))
        row |= {"low": 0.9 * loss, "high": 1.1 * loss}
    table = write_table(tmp_path / "t.csv", rows)
    found = fitted(tmp_path, *table, "--columns", "L/caption=low,L/text=high", "--spaced", "linear")
    assert list(found["losses"]) == ["loss/kind/caption", "loss/kind/text"]
    middle, low = found["parameters"], found["losses"]["loss/kind/caption"]["parameters"]
    assert middle["E"] == pytest.approx(low["E"] / 0.9, rel=1e-6)
    assert middle["beta"] == pytest.approx(low["beta"], rel=1e-6)
    assert found["regression_tokens_spaced"] == "linear"


def test_the_vision_coefficient_can_be_the_printed_one(tmp_path: Path) -> None:
    """C = 6 D (N - 0.483 N_v): late a is larger the more the encoder is left out of the count."""
    rows = [
        {**row, "N_v": 0.17 * float(str(row["N"])) + 1e7, "D_v": 0.544 * float(str(row["D"]))}
        for row in good()
    ]
    table = [*write_table(tmp_path / "t.csv", rows), "--columns", "N=N,D=D,L=L,N_v=N_v,D_v=D_v"]
    measured = fitted(tmp_path, *table)
    printed = fitted(tmp_path, *table, "--vision-coefficient", "0.483")
    assert measured["accounting"]["saved"] == pytest.approx(0.456)
    assert printed["accounting"]["saved"] == 0.483
    assert printed["parameters"] == measured["parameters"]
    assert printed["regression"]["a"] != measured["regression"]["a"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--weights", "text=1"], "--weights belongs to --law mixture"),
        (["--law", "mixture", "--weights", "text"], "--weights is text; give names with numbers"),
        (["--law", "mixture", "--weights", "code=1"], "names code, which is no loss of the data"),
        (["--law", "mixture", "--at", "N=1e9"], "--at is N=1e9; give N and D"),
        (["--columns", "L=L,L/text=L"], "give either one loss or several"),
        (["--columns", "L/text=nll"], "has no column 'nll'"),
    ],
)
def test_questions_that_data_cannot_answer_are_refused(
    flags: list[str], sentence: str, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", [{**row, "a": 0.5, "b": 0.5} for row in good()])
    if "--columns" not in flags:
        flags = [*flags, "--columns", "share/a=a,share/b=b"]
    with pytest.raises(SystemExit, match="error: ") as stopped:
        main(["fit", *table, *flags, "--out", str(tmp_path / "out")])
    assert sentence in str(stopped.value)
    assert not (tmp_path / "out").exists()


PAIR_COLUMNS = ("N", "D_i", "D_j", "L_i", "L_j")
BAD_PAIRS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "missing column": (
        lambda rows: [{k: v for k, v in row.items() if k != "D_j"} for row in rows],
        "has no column 'D_j' (--columns for D_j); it has: N, D_i, L_i, L_j.",
    ),
    "nan": (lambda rows: change(30, L_j="nan")(rows), "row 31 of"),
    "zero size": (lambda rows: change(0, N=0)(rows), "has N = 0 and needs a number above 0"),
    "negative tokens": (lambda rows: change(3, D_i=-1)(rows), "has D_i = -1"),
    "mixed units": (lambda rows: change(3, N=0.464)(rows), "give all rows in the same unit"),
    "perplexities": (lambda rows: change(3, L_i=33.1)(rows), "losses are nats per token"),
    "copied row": (lambda rows: [*rows, rows[-1]], "are the same point"),
    "nothing alone": (lambda rows: rows[20:], "0 rows of the first modality alone"),
    "few together": (lambda rows: rows[:43], "3 rows of both"),
    "one size": (
        lambda rows: [{**row, "N": row["N"] if i < 40 else 1e9} for i, row in enumerate(rows)],
        "N is 1e+09 at all 20 points",
    ),
}


@pytest.mark.parametrize(("spoil", "sentence"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pairs_are_refused_in_one_sentence(
    spoil: Callable[[Rows], Rows], sentence: str, tmp_path: Path
) -> None:
    columns = design(N=np.geomspace(8e6, 6.7e9, 5), D=np.geomspace(5e9, 1e11, 4))
    loss = CHINCHILLA.predict(NMM, columns=columns)
    rows: Rows = []
    for first, second in ((1, 0), (0, 1), (0.5, 0.5)):
        for n, d, one in zip(columns["N"], columns["D"], loss, strict=True):
            values = (n, first * d, second * d, one if first else "", one + 0.1 if second else "")
            rows.append(dict(zip(PAIR_COLUMNS, values, strict=True)))
    table = write_table(tmp_path / "t.csv", spoil(rows))
    with pytest.raises(SystemExit) as stopped:
        main(["fit-mixed", *table, "--out", str(tmp_path / "out")])
    said = str(stopped.value)
    assert said.startswith("error: ")
    assert sentence in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_frontier_has_intervals_on_request(tmp_path: Path) -> None:
    columns = design(N=SIZES, D=np.geomspace(2.5e9, 6e11, 9))
    rows = rows_of(planted(CHINCHILLA, NMM, columns=columns, noise=0.003))
    table = write_table(tmp_path / "t.csv", rows)
    main(["frontier", *table, "--bootstrap", "20", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "frontier.json").read_text())["frontiers"]["loss"]
    low, high = found["intervals"]["c"]
    assert low < found["c"] < high < 0
    with pytest.raises(SystemExit, match="lower --min-flops"):
        main(["frontier", *table, "--min-flops", "1e30", "--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_frontier_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = good()
    for row in rows:
        flops = 6 * float(str(row["N"])) * float(str(row["D"]))
        row["L"] = 29.574 * flops**-0.0492
    table = write_table(tmp_path / "t.csv", rows)
    main(["frontier", *table, "--min-flops", "3e19", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "frontier.json").read_text())["frontiers"]["loss"]
    assert found["k"] == pytest.approx(29.574, rel=1e-6)
    assert found["c"] == pytest.approx(-0.0492, rel=1e-6)
    assert "loss: L = 29.574 * C^-0.049200" in capsys.readouterr().out


def change(place: int, **values: object) -> Callable[[Rows], Rows]:
    return lambda rows: [{**row, **(values if i == place else {})} for i, row in enumerate(rows)]


BAD: dict[str, tuple[Callable[[Rows], Rows], list[str], str]] = {
    "missing column": (
        lambda rows: [{"params": row["N"], "D": row["D"], "L": row["L"]} for row in rows],
        [],
        "has no column 'N' (--columns for N); it has: params, D, L.",
    ),
    "misnamed column": (lambda rows: rows, ["--columns", "L=nll"], "has no column 'nll'"),
    "words": (change(3, L="ok"), [], "row 4 of"),
    "nan": (change(3, L="nan"), [], "has L = nan and needs a number above 0"),
    "infinite": (change(2, D="inf"), [], "has D = inf"),
    "zero size": (change(0, N=0), [], "row 1 of"),
    "negative tokens": (change(1, D=-5), [], "has D = -5"),
    "mixed units": (change(5, N=464), [], "with nothing between; give all rows in the same unit"),
    "perplexities": (change(5, L=33.1), [], "losses are nats per token"),
    "copied row": (lambda rows: [*rows, rows[2]], [], "row 3 and row 25 of"),
    "almost one size": (
        lambda rows: [{**row, "N": 1e9 + 1e5 * i} for i, row in enumerate(rows)],
        [],
        "so nothing can be told of its exponent",
    ),
    "few points": (lambda rows: rows[::6], [], "there are 4 points and the law chinchilla has 5"),
    "one size": (
        lambda rows: [{**row, "N": 1e9, "D": 1e9 * i + 1e9} for i, row in enumerate(rows)],
        [],
        "N is 1e+09 at all 24 points",
    ),
    "wrong flops": (
        lambda rows: [{**row, "C": 6 * float(str(row["N"]))} for row in rows],
        ["--columns", "N=N,D=D,C=C,L=L"],
        "and 6 N D =",
    ),
    "no sparsity": (lambda rows: rows, ["--law", "sparse"], "has no column 'S'"),
    "S above 1": (
        lambda rows: [{**row, "S": 87.5} for row in rows],
        ["--law", "sparse"],
        "it is a fraction below 1",
    ),
    "no shares": (lambda rows: rows, ["--law", "mixture"], "needs the shares of two domains"),
    "percent": (
        lambda rows: [{**row, "a": 45, "b": 55} for row in rows],
        ["--law", "mixture", "--columns", "share/a=a,share/b=b"],
        "add up to 100; they are fractions",
    ),
    "columns": (lambda rows: rows, ["--columns", "N:params"], "write it like N=params"),
    "holdout": (lambda rows: rows, ["--holdout", "bigger"], "--holdout is 'bigger'"),
    "drop all": (lambda rows: rows, ["--drop-highest", "24"], "--drop-highest is 24 of 24 points"),
    "group": (lambda rows: rows, ["--group", "model"], "has no column 'model' (--group)"),
    "no repetition": (
        lambda rows: [{**row, "U": row["D"]} for row in rows],
        ["--law", "repeated"],
        "no point has more tokens D than unique tokens U",
    ),
    "loss of a table": (lambda rows: rows, ["--loss", "loss"], "--loss is a key of runs"),
}


@pytest.mark.parametrize(("spoil", "flags", "sentence"), BAD.values(), ids=BAD)
def test_bad_tables_are_refused_in_one_sentence(
    spoil: Callable[[Rows], Rows], flags: list[str], sentence: str, tmp_path: Path
) -> None:
    table = write_table(tmp_path / "t.csv", spoil(good()))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *table, *flags, "--out", str(tmp_path / "out")])
    said = str(stopped.value)
    assert said.startswith("error: ")
    assert sentence in said
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing.csv", None, "cannot be read (No such file or directory)"),
        ("t.xlsx", b"PK", "give a .csv, .tsv or .jsonl file"),
        ("t.csv", b"", "has no rows of named columns"),
        ("t.csv", b"N,D,L\n", "has no rows of named columns"),
        ("t.jsonl", b"{", "is no .jsonl file"),
        ("t.jsonl", b"[1]\n", "has no rows of named columns"),
        ("t.csv", b"N,D,L\n\xff\xfe,1,1\n", "is no .csv file"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(
    name: str, content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--table", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert sentence in str(stopped.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags", [["--bootstrap", "-3"], ["--delta", "0"], ["--drop-highest", "x"], ["--law", "mine"]]
)
def test_flags_without_sense_are_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *EPOCH, *flags, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert f"argument {flags[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_does_not_cost_the_files(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nmm.scaling", "fit", *EPOCH, "--out", str(tmp_path)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "fit.json").read_text())["points"] == 245


def test_what_has_no_number_is_null(tmp_path: Path) -> None:
    """Coefficients of a resample may overflow; JSON has no infinity."""
    write(tmp_path / "fit.json", {"a": [1.0, float("inf")], "b": {"c": (float("nan"), 2)}})
    assert json.loads((tmp_path / "fit.json").read_text()) == {
        "a": [1.0, None],
        "b": {"c": [None, 2]},
    }
    ends = intervals({"x": np.array([*np.linspace(0, 1, 41), np.nan])})
    assert ends["x"] == (pytest.approx(0.025), pytest.approx(0.975))


def test_it_starts_without_torch_and_refuses_a_place_it_cannot_write(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['x', *sys.argv[1:]]; "
        "runpy.run_module('nmm.scaling', run_name='__main__')"
    )
    (tmp_path / "file").touch()
    arguments = ["fit", *EPOCH, "--out", str(tmp_path / "file" / "deep")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "objective" in done.stdout
    assert done.stderr.startswith("error: --out is")
    assert "Traceback" not in done.stderr
