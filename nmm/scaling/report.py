"""One page that says what a study found: laws, frontiers, best splits, and how far to trust them.

`report` writes DIR/report.html (all in one file), DIR/figures/*.svg and *.png, and DIR/report.csv
with every number of the page.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nmm.errors import UserError
from nmm.scaling.answers import ANSWERS, Answer, answers_section, read_answers
from nmm.scaling.files import FIT, FIT_MIXED, PHENOMENA, csv_text, read_fits, write_text
from nmm.scaling.page import (
    Chapter,
    chapter,
    chapter_section,
    coefficients_section,
    comparison_section,
)
from nmm.scaling.pieces import Figures, Section
from nmm.scaling.report_laws import LawFits, gather, law_section
from nmm.scaling.report_pairs import PairFit, pair_section, read_pair
from nmm.scaling.report_phenomena import Observed, phenomena_section, read_phenomena

CSS = Path(__file__).with_name("page.css")


@dataclass
class Study:
    """All that some directories hold, by the names that the user gave them."""

    chapters: list[Chapter] = field(default_factory=list)
    laws: list[LawFits] = field(default_factory=list)
    pairs: list[PairFit] = field(default_factory=list)
    phenomena: list[Observed] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)


def read_study(directories: Sequence[tuple[str, Path]], *, least_flops: float = 0.0) -> Study:
    """What `fit`, `fit-mixed`, `phenomena` and a study wrote; raises UserError where nothing is."""
    study = Study()
    for family, path in directories:
        if not any((path / name).exists() for name in (FIT, FIT_MIXED, PHENOMENA, ANSWERS)):
            raise UserError(
                f"--fit is {path}, which has no {FIT}, {FIT_MIXED}, {PHENOMENA} or {ANSWERS}; "
                f"write one with `python -m nmm.scaling fit ... --out {path}`."
            )
        if (path / FIT).exists():
            fits = read_fits(path)
            study.chapters += [
                chapter(family, one, least_flops=least_flops)
                for one in fits
                if one.record["law"] == "chinchilla"
            ]
            study.laws += gather(family, path, fits=fits)
        if (path / FIT_MIXED).exists():
            study.pairs.append(read_pair(family, path))
        if (path / PHENOMENA).exists():
            study.phenomena.append(read_phenomena(family, path))
        if (path / ANSWERS).exists():
            study.answers[family] = read_answers(path)
    return study


def report(study: Study, *, out: Path) -> None:
    """Write page, figures and numbers."""
    figures = Figures(out / "figures")
    sections = [_head(study)]
    sections += [answers_section(name, found) for name, found in study.answers.items()]
    if study.chapters:
        sections.append(comparison_section(study.chapters, figures=figures))
        sections.append(coefficients_section(study.chapters))
    sections += [chapter_section(one, figures=figures) for one in study.chapters]
    sections += [law_section(one, figures=figures) for one in study.laws]
    sections += [pair_section(one, figures=figures) for one in study.pairs]
    sections += [phenomena_section(one, figures=figures) for one in study.phenomena]
    body = "\n".join(section.html for section in sections)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Scaling laws</title>\n'
        f"<style>\n{CSS.read_text()}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    write_text(out / "report.csv", csv_text([row for part in sections for row in part.rows]))
    write_text(out / "report.html", page)


def _head(study: Study) -> Section:
    """What the letters mean, for a reader who has not seen the papers."""
    fits = [one.written.record for one in study.chapters]
    fits += [record for one in study.laws for record in one.records.values()]
    fits += [one.record for one in study.pairs]
    law = (
        " Most fits here have the form <b>L = E + A/N<sup>&alpha;</sup> + B/D<sup>&beta;</sup></b>:"
        " E is what no model of this kind gets below, the other two terms are the price of a small "
        "model and of little data."
    )
    return Section(
        "<h1>Scaling laws</h1><p>Each fit describes the held-out loss L of a model of N parameters "
        f"that has seen D tokens.{law if study.chapters else ''} Losses are nats per token; C are "
        f"training FLOPs. A fit called loss is of the mean over the kinds of data, where there are "
        f"several. {len(fits)} fits.</p>"
    )
