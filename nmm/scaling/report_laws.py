"""Sections of the report on laws with more than N and D: mixtures, sparsity, repeated tokens."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from nmm.plot import mixed as draw
from nmm.scaling.files import FIT, Record, Written
from nmm.scaling.laws import SPARSE
from nmm.scaling.mixtures import SHARE, MixtureLaw
from nmm.scaling.pieces import (
    Figures,
    Row,
    Section,
    csv_rows,
    doubts,
    ends,
    evidence,
    judged_values,
    metrics_table,
    parameters_table,
    readable,
    residual_html,
    residuals_of,
    table,
)
from nmm.scaling.printed import PRINTED_LAWS, PRINTED_MIXTURE_ERRORS
from nmm.scaling.repeated import effective

FORMULAS = {
    "mixture": "L = E + 1 / &sum; C<sub>i</sub> h<sub>i</sub><sup>&gamma;<sub>i</sub></sup> + "
    "A/N<sup>&alpha;</sup> + B/D<sup>&beta;</sup>, where h<sub>i</sub> is the share of a domain "
    "among the tokens. The best mixture is the same at every scale.",
    "mixture_joint": "L = E + 1 / &sum; C<sub>i</sub> h<sub>i</sub><sup>&gamma;<sub>i</sub></sup> "
    "+ A<sub>h</sub>/N<sup>&alpha;</sup> + B<sub>h</sub>/D<sup>&beta;</sup> with A<sub>h</sub> = A "
    "(&sum; a<sub>i</sub> h<sub>i</sub>)<sup>&kappa;</sup> and B<sub>h</sub> likewise, where "
    "h<sub>i</sub> is the share of a domain among the tokens. The best mixture depends on scale.",
    "sparse": "L = E + A/N<sup>&alpha;</sup> + B/D<sup>&beta;</sup> + C/(1-S)<sup>&lambda;</sup> + "
    "d/((1-S)<sup>&delta;</sup> N<sup>&gamma;</sup>), where N are the parameters that a token "
    "passes through and S is the fraction that it does not.",
    "repeated": "L = E + A/N'<sup>&alpha;</sup> + B/D'<sup>&beta;</sup>, where D' is what D tokens "
    "are worth when only U of them are new: U (1 + R<sub>D</sub> (1 - e<sup>-r/R<sub>D</sub></sup>"
    ")) after r repetitions; N' likewise for parameters beyond what U tokens can use.",
}


@dataclass(frozen=True)
class LawFits:
    """Fits of one law, of one group, to one or several losses."""

    family: str
    group: str
    fits: Mapping[str, Written]  # by the loss, as it is read
    best: Record = field(default_factory=dict)  # of mixtures: for all losses together

    @property
    def name(self) -> str:
        return f"{self.family}: {self.group}" if self.group else self.family

    @property
    def law(self) -> str:
        return next(iter(self.fits.values())).record["law"]

    @property
    def records(self) -> dict[str, Record]:
        return {name: one.record for name, one in self.fits.items()}


def gather(family: str, directory: Path, *, fits: Sequence[Written]) -> list[LawFits]:
    """The fits of a directory that are no chinchilla laws, by their group."""
    best = json.loads((directory / FIT).read_text()).get("best_mixtures", {})
    groups: dict[str, dict[str, Written]] = {}
    for one in fits:
        if one.record["law"] != "chinchilla":
            group, _, loss = one.title.rpartition(", ")
            groups.setdefault(group, {})[readable(loss)] = one
    return [
        LawFits(family, group, found, best.get(group.partition(" ")[2], {}))
        for group, found in groups.items()
    ]


def law_section(one: LawFits, *, figures: Figures) -> Section:
    records = one.records
    said = "".join(f"<p>{escape(name)}: {evidence(fit)}</p>" for name, fit in records.items())
    drawn: Callable[..., str] = {"sparse": _sparsity, "repeated": _repetition}.get(one.law, _mixing)
    html = (
        f"<h2>{escape(one.name)}: {escape(one.law.replace('_', ', '))} law</h2>"
        f"<p>{FORMULAS[one.law]}</p>{''.join(doubts(fit) for fit in records.values())}"
        f"{drawn(one, figures=figures)}{said}"
        f"{parameters_table(records, printed=PRINTED_LAWS.get(one.law, {}))}"
        f"{metrics_table(records)}{_residuals(one, figures=figures)}"
    )
    return Section(html, _rows(one))


def _residuals(one: LawFits, *, figures: Figures) -> str:
    return "".join(
        residual_html(
            figures, residuals_of(fit.points, flops=fit.points["C"]), of=f"the law of {name}"
        )
        for name, fit in one.fits.items()
    )


def _rows(one: LawFits) -> list[Row]:
    rows: list[Row] = []
    for name, fit in one.records.items():
        values = {**fit["parameters"], **judged_values(fit)}
        if best := fit.get("best_shares"):
            values |= {f"best share of {domain}": v for domain, v in best["shares"].items()}
        rows += csv_rows(f"{one.name}: {name}", values, spread=fit["intervals"])
    if one.best:
        rows += csv_rows(
            f"{one.name}: all losses", one.best["shares"], spread=one.best["intervals"]
        )
    return rows


def _mixing(one: LawFits, *, figures: Figures) -> str:
    """The best shares for every loss and for all together; losses along the shares."""
    first = next(iter(one.fits.values()))
    domains = list(first.record["domains"])
    best = one.best or first.record["best_shares"]
    weights = best["weights"]
    laws = {
        name: _by_shares(fit.record, size=best["N"], tokens=best["D"])
        for name, fit in one.fits.items()
        if name in weights or len(one.fits) == 1
    }

    def mean(shares: np.ndarray) -> np.ndarray:
        counted = list(weights.values())
        return np.average([loss(shares) for loss in laws.values()], axis=0, weights=counted)

    lines = {**laws, "weighted mean": mean} if len(laws) > 1 else laws
    drawn = figures.add(
        partial(draw.shares_figure, lines, best=best["shares"]),
        name="shares",
        words="The loss by the law when one domain gets more or less of the tokens and the others "
        f"share the rest as in the best mixture, at N = {best['N']:.3g} and D = {best['D']:.3g}. "
        "The dotted line is the best mixture.",
        wide=True,
    )
    if len(domains) == 3:
        drawn += figures.add(
            partial(
                draw.triangle_figure,
                mean if len(laws) > 1 else next(iter(laws.values())),
                domains=domains,
                runs=np.stack([first.points[SHARE + name] for name in domains], axis=1),
                best=np.array([best["shares"][name] for name in domains]),
            ),
            name="triangle",
            words="All mixtures of the three domains: a corner is one domain alone. Lighter is "
            "lower; dots are the mixtures of the runs.",
        )
    return _shares_table(one, domains=domains) + drawn


def _shares_table(one: LawFits, *, domains: Sequence[str]) -> str:
    found = {name: fit["best_shares"] for name, fit in one.records.items()}
    if one.best:
        said = ", ".join(f"{name} x {weight:.3g}" for name, weight in one.best["weights"].items())
        found = {f"all ({said})": one.best, **found}
    rows = []
    for name, best in found.items():
        row = [name, f"{best['N']:.3g}", f"{best['D']:.3g}", f"{best['loss']:.4f}"]
        for domain in domains:
            spread = ends(best["intervals"].get(domain))
            row.append(f"{best['shares'][domain]:.3f}" + (f" ({spread})" if spread else ""))
        rows.append(row)
    errors = ", ".join(f"{name} {error} %" for name, error in PRINTED_MIXTURE_ERRORS.items())
    return (
        "<h3>Best mixtures</h3>"
        + table(["for the loss of", "at N", "at D", "loss", *domains], rows)
        + f"<p>Mean errors in print (arXiv 2507.09404, native multimodal models): {errors}.</p>"
    )


def _by_shares(record: Record, *, size: float, tokens: float) -> Callable[[np.ndarray], np.ndarray]:
    """Shares [n, domains] -> loss [n] at one N and D."""
    law = MixtureLaw(tuple(record["domains"]), joint=record["law"] == "mixture_joint")

    def loss(shares: np.ndarray) -> np.ndarray:
        columns = {SHARE + name: shares[:, place] for place, name in enumerate(law.domains)}
        columns |= {"N": np.full(len(shares), size), "D": np.full(len(shares), tokens)}
        return law.predict(record["parameters"], columns=columns)

    return loss


def _sparsity(one: LawFits, *, figures: Figures) -> str:
    """Loss against the fraction of parameters asleep, of the sizes at the most tokens."""
    fit = next(iter(one.fits.values()))
    points = fit.points
    most = points["D"].max()
    keep = np.geomspace(points["keep"].min(), points["keep"].max(), 100)
    lines, dots = [], []
    for size in _few(np.unique(points["N"])):
        columns = {"N": np.full(100, size), "D": np.full(100, most), "keep": keep}
        lines.append(
            (f"N = {size:.3g}", 1 / keep, SPARSE.predict(fit.record["parameters"], columns=columns))
        )
        here = (points["N"] == size) & (points["D"] == most)
        dots.append((1 / points["keep"][here], points["L"][here]))
    return figures.add(
        partial(
            draw.lines_figure,
            lines,
            dots=dots,
            xlabel="all parameters / those that a token passes through",
            ylabel="loss (nats per token)",
            log="x",
        ),
        name="sparsity",
        words="What parameters are worth that a token does not pass through: lines are the law, "
        f"dots the runs with {most:.3g} tokens.",
    )


def _repetition(one: LawFits, *, figures: Figures) -> str:
    """What passes over the same tokens are worth, by the law."""
    fit = next(iter(one.fits.values()))
    star = fit.record["parameters"]["R_D"]
    largest = max(2.0, float((fit.points["D"] / fit.points["U"]).max()))
    passes = np.geomspace(1, largest, 200)
    worth, _, _ = effective(passes, unique=np.ones(200), log_star=np.log([[star]]))
    return figures.add(
        partial(
            draw.lines_figure,
            [(f"by the law, at most {1 + star:.3g}", passes, worth[0])],
            xlabel="passes over the same tokens, D / U",
            ylabel="worth so many passes over new tokens, D' / U",
            log="xy",
            diagonal=True,
        ),
        name="repetition",
        words="What repeated tokens are worth: where the line leaves the dotted one, another pass "
        "is no longer as good as new data.",
    )


def _few(values: np.ndarray) -> np.ndarray:
    """At most five of them, from the least to the greatest."""
    return values[np.unique(np.linspace(0, len(values) - 1, 5).round().astype(int))]
