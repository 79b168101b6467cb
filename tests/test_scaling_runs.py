"""Run directories as training leaves them: finished ones are points, all others are listed."""

import csv
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nmm import rundir
from nmm.errors import UserError
from nmm.log import JsonLog, read_rows
from nmm.scaling.__main__ import main
from nmm.scaling.eta import eta
from nmm.scaling.laws import CHINCHILLA, SPARSE
from nmm.scaling.lineage import whole_log
from nmm.scaling.pairs import read as read_pairs
from nmm.scaling.repeated import RepeatedLaw
from nmm.scaling.runs import labels_of, last_row, points_of, read_runs, shares_of
from tests import corpora
from tests import runs as trained
from tests.scaling_cases import NMM, SIZES, design
from tests.test_scaling_solve import SPARSE_TRUTH

STEPS = 40
SOURCES = ("caption", "text")


SHARES = {"source/caption": 0.25, "source/text": 0.75, "modality/image": 0.2, "modality/text": 0.8}


def write_run(
    directory: Path,
    *,
    size: float = 1e9,
    tokens: float = 1e10,
    last_step: int = STEPS,
    losses: dict[str, float] | None = None,
    rows: int = 4,
    vision: int = 0,
    shares: Mapping[str, float] | None = None,
) -> Path:
    """With the program's own writers; the held-out losses fall to `losses` at the last step, and
    of the tokens `shares` are of sources and modalities.
    """
    losses = losses if losses is not None else {"loss": 3.0, "loss/kind/text": 3.1}
    directory.mkdir(parents=True)
    manifest = {"N": int(size), "N_active": int(size), "N_vision": vision, "vocab_size": 50_432}
    rundir.write(
        directory,
        config_yaml=f"model:\n  width: {int(size**0.5)}\nrun:\n  name: {directory.name}\n",
        overrides=[],
        facts={**manifest, "total_steps": STEPS},
        start={"step": 0, "processes": 1},
    )
    train = JsonLog(directory / "losses.jsonl", keep_until_step=0)
    held_out = JsonLog(directory / "evals.jsonl", keep_until_step=0)
    for place in range(1, rows + 1):
        step, part = place * last_step // rows, place / rows
        counts = {"step": step, "tokens": int(tokens * part), "flops": 6 * size * tokens * part}
        spent = {
            f"tokens/{key}": int(tokens * part * share) for key, share in (shares or SHARES).items()
        }
        train.write({**counts, **spent, "loss": 4 - part, "seconds": 0.5, "lr": 1e-3})
        measured = {key: value + 5 * (1 - part) for key, value in losses.items()}
        held_out.write({**counts, "phase": "constant", **measured})
    train.close()
    held_out.close()
    return directory


def study(folder: Path) -> Path:
    """Thirty runs of a known law, and one of every kind that is no point."""
    for place, size in enumerate(SIZES):
        for number, tokens in enumerate(np.geomspace(2.5e9, 6e11, 5).round()):
            columns = {"N": np.array([round(size)]), "D": np.array([tokens])}
            loss = CHINCHILLA.predict(NMM, columns=columns)[0]
            losses = {"loss": loss, "loss/kind/caption": loss - 0.5, "loss/kind/text": loss + 0.5}
            name = f"size{place}_tokens{number}"
            write_run(folder / name, size=size, tokens=tokens, losses=losses)
    write_run(folder / "stopped", last_step=STEPS - 4)
    write_run(folder / "exploded", losses={"loss": 12.0})
    write_run(folder / "silent", losses={"loss/kind/text": 3.0})
    cut = write_run(folder / "unmeasured")
    lines = (cut / "evals.jsonl").read_text().splitlines(keepends=True)
    (cut / "evals.jsonl").write_text("".join(lines[:-1]))
    worse = write_run(folder / "worse")
    with (worse / "evals.jsonl").open("a") as log:
        log.write(json.dumps({"step": STEPS, "tokens": 1, "flops": 1, "loss": 3.9}) + "\n")
    (write_run(folder / "torn") / "manifest.json").write_text("{")
    tuned = write_run(folder / "tuned") / "manifest.json"
    parent = {"run": "runs/trunk", "step": 10, "mode": "weights", "tokens": 1, "flops": 1}
    tuned.write_text(json.dumps({**json.loads(tuned.read_text()), "parent": parent}))
    (write_run(folder / "empty") / "losses.jsonl").write_text("")
    (folder / "no run").mkdir()
    return folder


def test_a_study_gives_its_law_and_lists_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study(tmp_path / "runs")
    main(["fit", "--runs", str(folder), "--out", str(tmp_path / "fit")])
    found = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert found["points"] == 30
    assert found["parameters"] == pytest.approx(NMM, rel=1e-5)
    texts = found["losses"]["loss/kind/text"]["parameters"]
    assert texts["E"] == pytest.approx(NMM["E"] + 0.5, rel=1e-5)
    assert set(found["losses"]) == {"loss/kind/caption", "loss/kind/text"}
    reasons = {Path(name).name: reason for name, reason in found["left_out"].items()}
    said = capsys.readouterr().out
    for name, words in {
        "stopped": "unfinished: 36 of 40 steps",
        "empty": "unfinished: 0 of 40 steps",
        "exploded": "diverged: its held-out loss 12.000 is that of guessing",
        "silent": "diverged: its last held-out loss is no number",
        "worse": "diverged: its held-out loss ends at 3.900 and was 3.000",
        "unmeasured": "the last evaluation is of step 30",
        "torn": "unreadable",
        "tuned": "it began with weights of runs/trunk",
    }.items():
        assert words in reasons[name]
        assert f"left out: {folder / name}: {reasons[name]}" in said
    assert len(reasons) == 8


def with_parent(run: Path, *, parent: Path, step: int, mode: str) -> Path:
    facts = json.loads((run / "manifest.json").read_text())
    told = {"run": str(parent), "step": step, "mode": mode}
    (run / "manifest.json").write_text(json.dumps({**facts, "parent": told}))
    return run


def test_what_a_trunk_has_seen_its_branches_have_seen(tmp_path: Path) -> None:
    """A branch of a branch of a run with given weights is no point, also where all were moved."""
    root = write_run(tmp_path / "runs" / "root")
    tuned = with_parent(write_run(tmp_path / "runs" / "tuned"), parent=root, step=9, mode="weights")
    trunk = with_parent(write_run(tmp_path / "runs" / "trunk"), parent=tuned, step=9, mode="branch")
    leaf = with_parent(write_run(tmp_path / "runs" / "leaf"), parent=trunk, step=10, mode="branch")
    honest = with_parent(write_run(tmp_path / "runs" / "b"), parent=root, step=10, mode="branch")
    (tmp_path / "runs").rename(tmp_path / "moved")
    found = read_runs(tmp_path / "moved")
    assert {run.directory.name for run in found.finished} == {"root", honest.name}
    reasons = {Path(name).name: reason for name, reason in found.left_out.items()}
    assert set(reasons) == {"tuned", "trunk", leaf.name}
    assert all(reason.startswith("it began with weights of") for reason in reasons.values())


def test_the_log_of_a_branch_begins_with_its_trunk_s(tmp_path: Path) -> None:
    trunk = write_run(tmp_path / "trunk", rows=8)  # steps 5, 10, ..., 40
    branch = with_parent(write_run(tmp_path / "branch"), parent=trunk, step=20, mode="branch")
    lines = (branch / "losses.jsonl").read_text().splitlines(keepends=True)
    (branch / "losses.jsonl").write_text("".join(lines[2:]))  # steps 30 and 40
    assert [row["step"] for row in whole_log(branch, "losses.jsonl")] == [5, 10, 15, 20, 30, 40]
    assert [row["step"] for row in whole_log(trunk, "losses.jsonl")] == [*range(5, 41, 5)]


def test_a_run_that_was_really_trained_is_a_point() -> None:
    run = trained.undisturbed()
    (point,) = read_runs(run).finished
    last = read_rows(run / "evals.jsonl")[-1]
    manifest = json.loads((run / "manifest.json").read_text())
    points = points_of([point], loss="loss/kind/caption")
    assert points.loss.tolist() == [last["loss/kind/caption"]]
    assert points.columns["N"].tolist() == [manifest["N"]]
    assert points.columns["D"].tolist() == [last["tokens"]]
    assert points.columns["C"].tolist() == [last["flops"]]
    assert sum(share[0] for share in shares_of([point]).values()) == pytest.approx(1)
    assert labels_of([point], key="model.width") == ["32"]


def test_runs_that_were_really_trained_give_a_law(tmp_path: Path) -> None:
    """Four short runs and a longer one; one is cut off after the fact, and listed.

    Five points and five parameters: the law is nonsense, and says how few starts agree on it.
    """
    trained.short_runs(tmp_path / "runs", widths=(16, 48), steps=(10, 14))
    (tmp_path / "runs" / "longer").symlink_to(trained.undisturbed())
    shutil.copytree(tmp_path / "runs" / "w16_s10", tmp_path / "runs" / "cut")
    log = tmp_path / "runs" / "cut" / "losses.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    main(["fit", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "fit")])
    found = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert found["points"] == 5
    assert list(found["left_out"].values()) == ["unfinished: 9 of 10 steps"]
    assert set(found["losses"]) == {f"loss/kind/{kind.value}" for kind in corpora.KINDS}
    with (tmp_path / "fit" / "points.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["fit"] == "loss"]
    for row in rows:
        directory = Path(row["point"])
        manifest = json.loads((directory / "manifest.json").read_text())
        last = read_rows(directory / "evals.jsonl")[-1]
        assert float(row["L"]) == last["loss"]
        assert float(row["N"]) == manifest["N_active"]
        assert float(row["D"]) == last["tokens"]
        end = read_rows(directory / "losses.jsonl")[-1]
        has = manifest["source_tokens"]
        drawn = {name: end[f"tokens/source/{name}"] for name in has}
        assert float(row["U"]) == sum(min(has[name], drawn[name]) for name in has)
    longest = max(rows, key=lambda row: float(row["D"]))
    assert float(longest["U"]) < float(longest["D"])  # its corpus is small, and is read again


def test_unique_tokens_of_runs_tell_what_repetition_is_worth(tmp_path: Path) -> None:
    """One corpus of 4 billion tokens, 0.3 to 70 passes over it."""
    truth = {"E": 1.9, "A": 500.0, "alpha": 0.35, "B": 1500.0, "beta": 0.35, "R_D": 15, "R_N": 5}
    columns = design(N=np.geomspace(3e7, 8e9, 6), D=4e9 * np.array([0.3, 1, 2, 5, 12, 30, 70]))
    columns = {name: values.round() for name, values in columns.items()}
    columns["U"] = np.minimum(columns["D"], 4e9)
    losses = RepeatedLaw().predict(truth, columns=columns)
    for place, loss in enumerate(losses.tolist()):
        size, tokens = columns["N"][place], columns["D"][place]
        directory = tmp_path / "runs" / str(place)
        write_run(directory, size=size, tokens=tokens, losses={"loss": loss})
        manifest = json.loads((directory / "manifest.json").read_text())
        has = {"caption": 10**9, "text": 3 * 10**9}
        (directory / "manifest.json").write_text(json.dumps({**manifest, "source_tokens": has}))
    flags = ["--law", "repeated", "--loss", "loss", "--out", str(tmp_path)]
    main(["fit", "--runs", str(tmp_path / "runs"), *flags])
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["parameters"] == pytest.approx(truth, rel=0.02)


def test_sparse_runs_are_points_of_their_active_size(tmp_path: Path) -> None:
    """N of the laws is what a token passes through, S the rest; both laws come back."""
    for name, law in (("chinchilla", CHINCHILLA), ("sparse", SPARSE)):
        keeps = np.array([0.125]) if law is CHINCHILLA else np.array([1, 0.5, 0.25, 0.125])
        columns = design(N=SIZES[::2].round(), D=np.geomspace(2.5e9, 6e11, 4).round(), keep=keeps)
        truth = NMM if law is CHINCHILLA else SPARSE_TRUTH
        for place, loss in enumerate(law.predict(truth, columns=columns).tolist()):
            size, tokens = columns["N"][place], columns["D"][place]
            directory = tmp_path / name / str(place)
            write_run(directory, size=size, tokens=tokens, losses={"loss": loss})
            manifest = json.loads((directory / "manifest.json").read_text())
            whole = {"N": int(size / columns["keep"][place])}
            (directory / "manifest.json").write_text(json.dumps({**manifest, **whole}))
        flags = ["--law", name, "--loss", "loss", "--out", str(tmp_path)]
        main(["fit", "--runs", str(tmp_path / name), *flags])
        found = json.loads((tmp_path / "fit.json").read_text())
        assert found["metrics"]["mae_percent"] < 1e-3
        if law is CHINCHILLA:
            assert found["parameters"] == pytest.approx(truth, rel=1e-4)
            assert found["ranges"]["S"] == pytest.approx([0.875, 0.875])


def test_groups_by_a_key_of_the_config(tmp_path: Path) -> None:
    for width, number in ((1000, 0), (1000, 1), (2000, 0)):
        write_run(tmp_path / f"{width}_{number}", size=width**2, tokens=1e9 * (number + 1))
    found = read_runs(tmp_path).finished
    assert labels_of(found, key="model.width") == ["1000", "1000", "2000"]
    with pytest.raises(UserError, match=r"model\.heads, which .* does not have"):
        labels_of(found, key="model.heads")


def test_copies_missing_losses_and_empty_folders_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "first")
    shutil.copytree(run, tmp_path / "runs" / "second")
    found = read_runs(tmp_path / "runs").finished
    with pytest.raises(UserError, match=r"first and .*second of --runs are the same point"):
        points_of(found, loss="loss")
    with pytest.raises(
        UserError, match="no 'loss/kind/speech' in its last evaluation; it has: loss"
    ):
        points_of(found, loss="loss/kind/speech")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no finished run"):
        read_runs(tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        read_runs(tmp_path / "missing")


def test_late_fusion_runs_are_accounted_by_what_they_measured(tmp_path: Path) -> None:
    for place, size in enumerate(SIZES):
        for tokens in (1e10, 1e11, 4e11):
            columns = {"N": np.array([round(size)]), "D": np.array([tokens])}
            loss = {"loss": float(CHINCHILLA.predict(NMM, columns=columns)[0])}
            directory = tmp_path / "runs" / f"{place}_{tokens:g}"
            write_run(directory, size=size, tokens=tokens, losses=loss, vision=round(0.17 * size))
    main(["fit", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "fit.json").read_text())
    assert found["accounting"]["saved"] == pytest.approx(0.8)  # 0.2 of the tokens are images
    assert found["accounting"]["slope"] == pytest.approx(0.17, rel=1e-6)
    assert found["parameters"]["alpha"] == pytest.approx(NMM["alpha"], rel=1e-4)


def test_thousands_of_runs_are_read_in_seconds(tmp_path: Path) -> None:
    """A tenth of 10,000 runs in a tenth of a minute."""
    first = write_run(tmp_path / "runs" / "0", rows=20)
    for number in range(1, 1000):
        directory = tmp_path / "runs" / str(number)
        directory.mkdir()
        for name in ("manifest.json", "losses.jsonl", "evals.jsonl"):
            (directory / name).hardlink_to(first / name)
    started = time.process_time()
    assert len(read_runs(tmp_path / "runs").finished) == 1000
    assert time.process_time() - started < 6


def test_a_log_of_a_hundred_thousand_rows_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows=20)
    row = read_rows(run / "losses.jsonl")[-1]
    rows = [{**row, "step": step, "loss": step / 7} for step in range(1, 100_001)]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 100001, "lo')
    assert read_rows(path) == rows
    assert last_row(path) == rows[-1]


def write_curve(directory: Path, *, losses: np.ndarray, flops: float, seconds: float) -> Path:
    directory.mkdir()
    log = JsonLog(directory / "losses.jsonl", keep_until_step=0)
    for step, loss in enumerate(losses.tolist(), start=1):
        row = {"step": step, "flops": flops * step, "seconds": seconds, "loss": loss}
        log.write({**row, "loss/modality/text": loss + 1, "loss/modality/image": None})
    log.close()
    evals = JsonLog(directory / "evals.jsonl", keep_until_step=0)
    for step in range(0, len(losses) + 1, 10):
        held_out = {"loss": losses[step - 1].item() + 0.5} if step else {"loss": 9.0}
        evals.write({"step": step, "flops": flops * step, **held_out})
    evals.close()
    return directory


def test_eta_is_the_ratio_of_steps_times_their_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sparse run reaches at step 25 what the dense one has at step 100, at twice the time."""
    steps = np.arange(1, 101)
    dense = write_curve(tmp_path / "a", losses=5 - steps / 50, flops=1e15, seconds=0.1)
    sparse = write_curve(tmp_path / "b", losses=5 - steps * 4 / 50, flops=1e15, seconds=0.2)
    overall, text = eta(dense, sparse)
    assert (overall.loss, text.loss) == ("loss", "loss/modality/text")
    assert overall.matched_step == pytest.approx(25, abs=1)
    assert overall.flops == pytest.approx(100 / overall.matched_step)
    assert overall.seconds == pytest.approx(50 / overall.matched_step)
    assert text.flops == overall.flops
    main(["eta", "--dense", str(dense), "--sparse", str(sparse)])
    assert f"loss: eta {overall.flops:.2f} by FLOPs" in capsys.readouterr().out
    (held_out,) = eta(dense, sparse, held_out=True)
    step = 20 * 1.5**0.5  # half of the loss between the evaluations after 20 and 30 steps
    assert (held_out.dense_loss, held_out.matched_step) == pytest.approx((3.5, step))
    assert (held_out.flops, held_out.seconds) == pytest.approx((100 / step, 50 / step))
    grown, branch = (
        write_curve(tmp_path / n, losses=5 - steps / 9, flops=1, seconds=1) for n in "cd"
    )
    for run, parent, mode in ((grown, dense, "upcycle"), (branch, grown, "branch")):
        facts = {"parent": {"run": str(parent), "step": 50, "mode": mode}}
        (run / "manifest.json").write_text(json.dumps(facts))
    spent = [eta(dense, run)[0].seconds for run in (grown, branch)]
    assert spent[0] == spent[1] < eta(dense, sparse)[0].seconds  # both have the seed behind them
    never = eta(sparse, dense)[0]
    assert (never.flops, never.seconds) == (None, None)


def test_pairs_of_runs_are_sorted_by_the_tokens_they_saw(tmp_path: Path) -> None:
    class Given:
        runs, table, columns, pair, sources = tmp_path, None, None, "text,image", False

    with pytest.raises(UserError, match="holds no finished run"):
        read_pairs(Given)  # pyright: ignore[reportArgumentType]
    for number in range(5):
        both = {"loss": 3.0, "loss/modality/text": 3.0, "loss/modality/image": 4.0 + number}
        write_run(tmp_path / f"both{number}", tokens=1e9 * (number + 1), losses=both)
    with pytest.raises(UserError, match="0 rows of the first modality alone"):
        read_pairs(Given)  # pyright: ignore[reportArgumentType]
    units = "data: {sources: {images: {kind: units, weight: 1.0}, text: {kind: text, weight: 0.0}}}"
    for number in range(5):  # the marks around an image are text
        (tmp_path / f"both{number}" / "config.yaml").write_text(units)
    with pytest.raises(UserError, match="0 rows of the first modality alone"):
        read_pairs(Given)  # pyright: ignore[reportArgumentType]
    Given.pair = "image,text"
    with pytest.raises(UserError, match="0 rows of the second modality alone"):
        read_pairs(Given)  # pyright: ignore[reportArgumentType]


def test_pairs_may_be_sources_of_their_own(tmp_path: Path) -> None:
    """By source, marks of units are no text: a run of one source alone is what it says."""

    class Given:
        runs, table, columns, pair, sources = tmp_path, None, None, "caption,text", True

    for name, shares in (("a", (1, 0)), ("b", (0, 1)), ("both", (0.5, 0.5))):
        for number in range(5):
            tokens = 1e9 * (number + 1)
            losses = {"loss": 3.0, "loss/source/caption": 2.0 + number, "loss/source/text": 4.0}
            of = dict(zip(("source/caption", "source/text"), shares, strict=True))
            write_run(tmp_path / f"{name}{number}", tokens=tokens, losses=losses, shares=of)
    found = read_pairs(Given)  # pyright: ignore[reportArgumentType]
    assert [len(part) for part in (*found.alone, found.together)] == [5, 5, 5]
    assert found.alone[0].loss.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert found.together.loss.tolist() == [3.0, 3.5, 4.0, 4.5, 5.0]
    assert found.together.columns["D_i"][0] == 5e8
