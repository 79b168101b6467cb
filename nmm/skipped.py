"""Updates that were left out because loss or gradient were no numbers: listed, counted, limited.

Their documents are in skipped.jsonl. Every process has the same counts, so all of them stop.
"""

from pathlib import Path

from nmm.checkpoint import Progress
from nmm.engine import StepResult
from nmm.errors import DivergenceError
from nmm.log import Row

FILE = "skipped.jsonl"
IN_A_ROW = "skipped_in_a_row"  # a key of losses.jsonl
NAMED = 5


def count(progress: Progress, result: StepResult) -> None:
    """Add a step to the counts of the run."""
    totals = progress.totals
    totals["skipped_steps"] = totals.get("skipped_steps", 0) + (not result.applied)
    totals[IN_A_ROW] = 0 if result.applied else totals.get(IN_A_ROW, 0) + 1


def row(progress: Progress, result: StepResult) -> Row:
    """The row of skipped.jsonl (docs/scaling.md)."""
    return {
        "step": progress.step,
        "in_a_row": progress.totals[IN_A_ROW],
        "loss": result.tally.loss(),
        "grad_norm": result.grad_norm,
        "documents": result.suspects,
    }


def refuse_many(progress: Progress, result: StepResult, *, limit: int, directory: Path) -> None:
    """Stop after `limit` in a row: it is not one document, or it is always the same."""
    in_a_row = progress.totals[IN_A_ROW]
    if in_a_row < limit:
        return
    raise DivergenceError(
        f"{in_a_row} updates in a row, up to step {progress.step}, were left out, because the loss "
        f"({result.tally.loss()}) or the norm of the gradient ({result.grad_norm}) was no finite "
        f"number; start another run (run.name=NEW) with a lower optim.learning_rate, or look at "
        f"the documents of the steps ({len(result.suspects)} in the last, the first are "
        f"{', '.join(result.suspects[:NAMED])}; {directory / FILE} lists all), or raise "
        f"engine.max_skipped_in_a_row."
    )
