"""Answers to a study's questions: a number, its interval, and what follows for the paper's claim.

The rule: a claim says that the number lies in a range. The study `reproduces` it if the whole 95 %
interval lies in the range, and `does not reproduce` it if all of the interval lies outside. If
the interval reaches over an end of the range, the study `cannot tell at this scale`. Numbers
without a claim are `reported`; there may also be `no number`, and `from` says why.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from nmm.errors import UserError
from nmm.scaling.estimates import Estimate
from nmm.scaling.files import csv_text, write, write_text
from nmm.scaling.pieces import Row, Section, table

ANSWERS = "answers.json"
REPRODUCES, DOES_NOT = "reproduces", "does not reproduce"
CANNOT_TELL, REPORTED, NO_NUMBER = "cannot tell at this scale", "reported", "no number"
HEAD = ("question", "value", "95 % interval", "claim", "verdict", "the paper", "measured", "from")


@dataclass(frozen=True)
class Answer:
    """One question's. `measured` says of what the number is; `estimate` is None where none was
    possible, and `why_not` says why. `claim` is the range of the paper, None for no claim.
    """

    question: str
    measured: str
    estimate: Estimate | None
    claim: tuple[float, float] | None = None
    paper: str = ""
    why_not: str = ""

    @property
    def verdict(self) -> str:
        if self.estimate is None:
            return CANNOT_TELL if self.claim else NO_NUMBER
        return verdict(self.estimate, claim=self.claim)

    @property
    def cells(self) -> list[str]:
        """Those of HEAD."""
        one = self.estimate
        value, interval = (
            ("-", "-") if one is None else (_said(one.value), _range(one.low, one.high))
        )
        return [
            *(self.question, value, interval),
            "" if self.claim is None else _range(*self.claim),
            *(self.verdict, self.paper, self.measured),
            self.why_not if one is None else one.how,
        ]


def verdict(estimate: Estimate, *, claim: tuple[float, float] | None) -> str:
    """What the interval says of a claim, by the rule above."""
    if claim is None:
        return REPORTED
    low, high = claim
    if low <= estimate.low and estimate.high <= high:
        return REPRODUCES
    return DOES_NOT if estimate.high < low or high < estimate.low else CANNOT_TELL


def _range(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return "not known"
    if math.isinf(high):
        return f"above {_said(low)}"
    return f"below {_said(high)}" if math.isinf(low) else f"{_said(low)} to {_said(high)}"


def _said(value: float) -> str:
    return f"{value:.3g}"


def write_answers(answers: Sequence[Answer], *, study: str, out: Path) -> None:
    """answers.json for the report, and the same as answers.csv and answers.md for people."""
    rows = [
        {
            "study": study,
            "question": one.question,
            "measured": one.measured,
            **asdict(one.estimate or Estimate(math.nan, math.nan, math.nan, one.why_not)),
            **dict(zip(("claim_low", "claim_high"), one.claim or (None, None), strict=True)),
            "verdict": one.verdict,
            "paper": one.paper,
        }
        for one in answers
    ]
    write_text(out / "answers.csv", csv_text(rows))
    lines = [HEAD, ["---"] * len(HEAD), *(one.cells for one in answers)]
    write_text(out / "answers.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    write(out / ANSWERS, {"study": study, "answers": [asdict(one) for one in answers]})


def read_answers(directory: Path) -> list[Answer]:
    """What `write_answers` wrote; raises UserError where that cannot be read."""
    try:
        found = json.loads((directory / ANSWERS).read_text())["answers"]
        return [_read(one) for one in found]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory} has no readable {ANSWERS}; `python -m launch.study report study=NAME` "
            f"writes one."
        ) from None


def _read(one: Row) -> Answer:
    """JSON has null for infinity; where it stands says which end it is."""
    estimate = one["estimate"]
    if estimate is not None:
        value = math.nan if estimate["value"] is None else estimate["value"]
        ends = _ends(estimate["low"], estimate["high"])
        estimate = Estimate(**{**estimate, **ends, "value": value})
    claim = None if one["claim"] is None else tuple(_ends(*one["claim"]).values())
    return Answer(**{**one, "estimate": estimate, "claim": claim})


def _ends(low: float | None, high: float | None) -> dict[str, float]:
    return {
        "low": -math.inf if low is None else low,
        "high": math.inf if high is None else high,
    }


def answers_section(name: str, answers: Sequence[Answer]) -> Section:
    """The first part of a study's page."""
    html = (
        f"<h2>{escape(name)}: the paper's questions</h2>"
        "<p>A claim of the paper is a range for a number. It reproduces if the whole 95 % interval "
        "lies in the range, and does not if all of it lies outside; else this study cannot tell at "
        "this scale. Losses are nats per token.</p>"
        f"{table(HEAD, [one.cells for one in answers], of_words=True)}"
    )
    rows = [
        {
            "fit": name,
            "quantity": f"{one.question}: {one.measured}",
            "value": one.estimate.value,
            "low": one.estimate.low,
            "high": one.estimate.high,
        }
        for one in answers
        if one.estimate
    ]
    return Section(html, rows)
