"""Three kills of random processes at random moments, one while saving; see tests/soak.py."""

from pathlib import Path

from tests import soak
from tests.launches import check_same_logs
from tests.runs import rows


def test_killed_at_random_moments_equals_undisturbed(tmp_path: Path) -> None:
    """The first launch starts again by itself and is killed again; the second one finishes."""
    kills = soak.planned(3, seed=3, starting=False)
    assert {kill.rank for kill in kills} == {0, 1}
    whole = soak.undisturbed(tmp_path, steps=soak.steps_for(3))
    seen = soak.disturbed(tmp_path, kills, restarts=1)
    assert (seen.exit_codes, seen.phases.total()) == ([1, 0], 3)
    check_same_logs(tmp_path / "killed", whole)

    losses, quarantine = rows(whole / "losses.jsonl"), rows(whole / "quarantine.jsonl")
    cut = [row for row in quarantine if (row["key"], row["split"]) == ("cut", "train")]
    assert len(cut) > 1  # of more than one epoch
    half, end = losses[len(losses) // 2 - 1], losses[-1]
    texts = [row["tokens/source/text"] / row["tokens"] for row in (half, end)]
    assert texts[1] > 1.3 * texts[0]  # the weights have changed
