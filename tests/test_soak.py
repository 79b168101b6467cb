"""Three kills of random processes at random moments, one while saving; see tests/soak.py."""

import json
from pathlib import Path

from tests import runs, soak
from tests.launches import check_same_logs
from tests.runs import rows
from tests.train_cases import two_undisturbed


def test_killed_at_random_moments_equals_undisturbed(tmp_path: Path) -> None:
    """The first launch starts again by itself and is killed again; the second one finishes."""
    kills = soak.planned(3, seed=3, starting=False)
    assert {kill.rank for kill in kills} == {0, 1}
    assert soak.steps_for(3) == runs.TWO_STEPS
    seen = soak.disturbed(tmp_path, kills, restarts=1)
    assert (seen.exit_codes, len(seen.killed)) == ([1, 0], 3)
    whole, run = two_undisturbed(), tmp_path / "killed"
    check_same_logs(run, whole)

    lost = [json.loads(line) for line in (run / "faults.jsonl").read_text().splitlines()]
    assert [(row["rank"], row["pid"]) for row in lost] == seen.killed
    said = (tmp_path / "log").read_text()
    for row in lost:
        assert f"error: process {row['rank']} of 2 no longer answers after step " in said
        assert f"; it was in step {row['step']}, {row['phase']}" in said
    assert "Traceback" not in said

    losses, quarantine = rows(whole / "losses.jsonl"), rows(whole / "quarantine.jsonl")
    cut = [row for row in quarantine if (row["key"], row["split"]) == ("cut", "train")]
    assert len(cut) > 1  # of more than one epoch
    half, end = losses[len(losses) // 2 - 1], losses[-1]
    texts = [row["tokens/source/text"] / row["tokens"] for row in (half, end)]
    assert texts[1] > 1.3 * texts[0]  # the weights have changed
