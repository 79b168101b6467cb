"""Real studies: killed and continued, extended, with a run that diverges and a log with a hole."""

import csv
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from launch.study.__main__ import main
from launch.study.plan import plan_runs
from launch.study.state import Folder, Standing, State, standings_of
from nmm import rundir
from nmm.config import compose_study
from tests import runs
from tests.launches import children, last_step, started, wait_until
from tests.test_study import study_file

BUDGETS = (24, 36)  # steps
STEP_TOKENS = 8 * 128
# Of tests.runs.overrides, what a study sets by itself.
OWN = ("run.dir", "schedule.", "evaluation.", "model.width")


def small(folder: Path, *budgets: int) -> list[str]:
    """The words of a study of one size that learns and one that cannot."""
    words = [w for w in runs.overrides(runs.corpus(), folder) if not w.startswith(OWN)]
    more = ["log.wandb=off", "data.workers=0", "schedule.warmup_steps=4", "optim.name=sgd"]
    more += ["optim.weight_decay=0", "optim.learning_rate=0.1", "evaluation.rows_per_source=2"]
    sizes = {
        "w32": {"overrides": ["model.width=32"]},
        "wild": {
            "overrides": ["model.width=16", "optim.learning_rate=1e30", "optim.clip_norm=0"],
            "token_budgets": [12 * STEP_TOKENS],
        },
    }
    return study_file(
        folder,
        overrides=words + more,
        token_budgets=[steps * STEP_TOKENS for steps in budgets],
        families={"early": {"sizes": sizes}},
    )


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "launch.study", *words]


def standings(words: list[str]) -> dict[str, Standing]:
    study = compose_study(words).study
    return standings_of(plan_runs(study), Folder(Path(study.dir), study.name), retries=1)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A study that was run to its end, by three launchers.

    The first is killed while a trunk is trained. The second finds that run alive, waits for it, and
    is asked to stop.
    """
    folder = tmp_path_factory.mktemp("study")
    words, log, later = small(folder, *BUDGETS), folder / "said", folder / "said_later"
    trunk = folder / "runs" / "ours-early-w32-trunk4"
    with started(command(*words), log=log) as first:
        wait_until(lambda: last_step(trunk) > 5, seconds=100, log=log)
        (orphan,) = children(first.pid)
        os.kill(orphan, signal.SIGSTOP)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with started(command(*words), log=later) as second:
            wait_until(lambda: "trunk4 at" in later.read_text(), seconds=60, log=later)
            os.kill(second.pid, signal.SIGTERM)
            wait_until((trunk / "STOP").exists, seconds=30, log=later)
            os.kill(orphan, signal.SIGCONT)
            assert second.wait(timeout=100) == 75, later.read_text()
    done = runs.run(command(*words))
    assert done.returncode == 0, done.stdout + done.stderr
    return words


def test_a_study_survives_its_launchers(words: list[str]) -> None:
    """The run that lost its launcher went on, was stopped through the second, and continued."""
    found = standings(words)
    assert {name: one.state for name, one in found.items() if "w32" in name} == {
        "ours-early-w32-trunk4": State.finished,
        "ours-early-w32-24p576k": State.finished,
        "ours-early-w32-36p864k": State.finished,
    }
    folder = Path(words[2].partition("=")[2])
    manifest = json.loads((folder / "ours-early-w32-trunk4" / "manifest.json").read_text())
    assert [start["ended"]["how"] for start in manifest["starts"]] == ["stopped", "finished"]
    steps = [row["step"] for row in runs.rows(folder / "ours-early-w32-trunk4" / "losses.jsonl")]
    assert steps == list(range(1, 31 + 1))
    table = csv.DictReader((folder / "ours" / "runs.csv").read_text().splitlines())
    losses = {row["run"]: row["loss"] for row in table}
    assert float(losses["ours-early-w32-36p864k"]) < float(losses["ours-early-w32-24p576k"])
    assert losses["ours-early-w32-trunk4"] == ""


def test_a_run_that_diverges_is_left_out_with_its_branches(words: list[str]) -> None:
    found = standings(words)
    trunk, branch = found["ours-early-wild-trunk4"], found["ours-early-wild-12p288k"]
    assert (trunk.state, branch.state) == (State.left_out, State.left_out)
    assert trunk.note.startswith("diverged")
    assert "ours-early-wild-trunk4 was left out" in branch.note


def test_a_log_with_a_hole_is_not_used(words: list[str]) -> None:
    path = Path(words[2].partition("=")[2]) / "ours-early-w32-24p576k" / "losses.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    try:
        path.write_text("".join(lines[:1] + lines[2:]))
        one = standings(words)["ours-early-w32-24p576k"]
        path.write_text("".join([*lines, lines[-1]]))
        twice = standings(words)["ours-early-w32-24p576k"]
    finally:
        path.write_text(whole)
    assert (one.state, twice.state) == (State.left_out, State.left_out)
    assert "goes from step 22 to step 24" in one.note
    assert "goes from step 24 to step 24" in twice.note


def test_further_budgets_cost_their_cooldowns_and_what_the_trunk_lacks(words: list[str]) -> None:
    folder = Path(words[2].partition("=")[2])
    before = (folder / "ours-early-w32-24p576k" / "manifest.json").read_bytes()
    more = small(folder.parent, *BUDGETS, 30, 40)
    done = runs.run(command(*more))
    assert done.returncode == 0, done.stdout + done.stderr
    first = {
        name: json.loads((folder / f"ours-early-w32-{name}" / "manifest.json").read_text())
        for name in ("trunk4", "30p72k", "40p96k")
    }
    assert [start["step"] for start in first["trunk4"]["starts"]][-1] == 31
    assert first["30p72k"]["parent"]["step"] == 21  # the trunk has not kept step 26
    assert first["40p96k"]["parent"]["step"] == 34
    assert (folder / "ours-early-w32-24p576k" / "manifest.json").read_bytes() == before


def test_a_run_that_fails_is_tried_again_so_often_and_after_a_retry_as_often_again(
    tmp_path: Path,
) -> None:
    """Its shards are missing; when they are there it is finished, after a launcher without time."""
    corpus, shards = runs.corpus(), tmp_path / "shards"
    words = [*small(tmp_path, 12), "~study.families.early.sizes.wild"]
    file = tmp_path / "study" / "ours.yaml"
    file.write_text(file.read_text().replace(f"{corpus}/", f"{shards}/"))
    failures = Folder(tmp_path / "runs", "ours").failures

    def launch(*more: str) -> tuple[int, str]:
        done = runs.run(command(*more, *words))
        return done.returncode, done.stdout

    code, said = launch()
    assert (code, said.count("failed: ours-early-w32-trunk4: exit code 1: error: ")) == (1, 2)
    assert len(failures()["ours-early-w32-trunk4"]) == 2
    assert standings(words)["ours-early-w32-trunk4"].state is State.failed
    shards.symlink_to(corpus)
    code, said = launch("retry", "study.max_minutes=1e-6")
    assert (code, "study.max_minutes=1e-06 passed" in said) == (75, True)
    assert (failures(), said.count("finished")) == ({}, 1)
    code, said = launch()
    assert code == 0, said
    assert {one.state for one in standings(words).values()} == {State.finished}


def test_runs_that_were_made_otherwise_are_not_taken_for_the_study_s(words: list[str]) -> None:
    folder = Path(words[2].partition("=")[2])
    other = ["study.families.early.sizes.w32.overrides=['model.width=48']"]
    with pytest.raises(SystemExit, match=r"was made with model\.width=32 and the study says"):
        main([*words, *other])
    with rundir.lock(folder / "ours", is_main=True):
        done = runs.run(command(*words))
    assert (done.returncode, "another launcher runs this study" in done.stderr) == (1, True)
