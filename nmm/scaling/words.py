"""Fits for people: parameters, evidence and doubts, as lines of text."""

from collections.abc import Sequence

from nmm.scaling.files import Record
from nmm.scaling.floor import to_print


def table(record: Record, *, title: str) -> str:
    """For people."""
    lines = [title, f"{record['law']} law, {record['points']} points, delta {record['delta']:g}"]
    spread = record["intervals"]
    for name, value in {**record["parameters"], **record["exponents"]}.items():
        low_high = [to_print(name, end) for end in spread.get(name, ())]
        said = f"   [{low_high[0]:.6g}, {low_high[1]:.6g}]" if low_high else ""
        lines.append(f"  {name:<12}{to_print(name, value):>14.7g}{said}")
    lines += _objective_lines(record)
    lines.append(f"fitted in {record['seconds']:.2f} s by the solver {record['solver']}")
    if best := record.get("best_shares"):
        lines.append(mixture_table(best, title=""))
    lines += [*_metrics_lines(record), *_regression_lines(record), *_doubts(record)]
    return "\n".join(lines)


def _objective_lines(record: Record) -> list[str]:
    """Of a fit or of a part of one."""
    agreement = record["agreement"]
    lines = [
        f"objective {record['objective']:.10e} (sum of Huber), found by "
        f"{agreement['at_best_fraction']:.1%} of {record['starts']:,} starts, largest derivative "
        f"{record['gradient']:.0e}"
    ]
    if not agreement["confirmed"]:
        lines.append("NOT CONFIRMED: hardly any other start ended at this minimum")
    if not record.get("has_floor", True):
        lines.append("E is 0 as far as these points tell: their losses still fall as powers")
    return lines


def frontier_table(record: Record, *, title: str) -> str:
    """The power law along the lowest losses, and the exponent of N by parabolas."""
    spread = {
        name: f"   [{low:.6g}, {high:.6g}]" for name, (low, high) in record["intervals"].items()
    }
    lines = [f"{title}: L = {record['k']:.6g} * C^{record['c']:.6f}"]
    lines += [f"  {name:<12}{record[name]:>14.7g}{ends}" for name, ends in spread.items()]
    if record["isoflop_a"] is not None and "isoflop_a" not in spread:
        lines.append(f"  N_opt ~ C^{record['isoflop_a']:.4f} by parabolas")
    return "\n".join(lines)


def mixture_table(best: Record, *, title: str) -> str:
    """The shares with the lowest weighted mean of some losses."""
    of = ", ".join(f"{name} x {weight:.3g}" for name, weight in best["weights"].items())
    lines = [
        f"best mixture{' of ' * bool(title)}{title} at N {best['N']:.4g} and D {best['D']:.4g} "
        f"for {of}: {best['loss']:.4f}"
    ]
    for name, share in best["shares"].items():
        spread = best["intervals"].get(name)
        ends = f"   [{spread[0]:.4f}, {spread[1]:.4f}]" if spread else ""
        lines.append(f"  {name:<12}{share:>14.4f}{ends}")
    return "\n".join(lines)


def pair_table(record: Record) -> str:
    """Of two modalities: their laws alone, the interaction, and the barrier."""
    lines = []
    for which, one in zip(("first", "second"), record["alone"], strict=True):
        parameters = one["parameters"].items()
        values = "  ".join(f"{name} {to_print(name, value):.6g}" for name, value in parameters)
        lines += [f"== the {which} alone, {one['points']} points", f"  {values}"]
        lines += _objective_lines(one)
    lines.append(f"== together, {record['points']} points")
    for name, value in record["parameters"].items():
        spread = record["intervals"].get(name)
        ends = f"   [{spread[0]:.6g}, {spread[1]:.6g}]" if spread else ""
        lines.append(f"  {name:<12}{value:>14.7g}{ends}")
    lines += _objective_lines(record)
    lines.append(f"in the product form {record['product_form']['objective']:.10e}")
    return "\n".join([*lines, *_metrics_lines(record), *_barrier_lines(record), *_doubts(record)])


def no_barrier(record: Record) -> str:
    """Why a pair has no cheapest point of synergy."""
    if record["parameters"]["C"] > 0:
        return "the barrier lies beyond the largest number"
    return "no synergy at any scale (C is not above 0)"


def _barrier_lines(record: Record) -> list[str]:
    if record["barrier"] is None:
        return [no_barrier(record)]
    cheapest, spread = record["barrier"], record["barrier_intervals"]
    lines = [
        f"synergy from N = {cheapest['size']:.4g} and D = {cheapest['tokens']:.4g} tokens of both "
        f"modalities on, at the cheapest ({cheapest['flops']:.4g} FLOPs)"
    ]
    for name, (low, high) in spread.items():
        lines.append(f"  {name:<12}{cheapest[name]:>14.7g}   [{low:.6g}, {high:.6g}]")
    return lines


def _metrics_lines(record: Record) -> list[str]:
    lines = ["                MSE        R2     MAE %"]
    rows = [("fitted", record["metrics"])]
    if record["holdout"]:
        rows += [("held out", record["holdout"]["metrics"])]
        rows += [("by a ruler", record["holdout"]["naive_metrics"])]
    for name, found in rows:
        r2 = "-" if found["r2"] is None else f"{found['r2']:.4f}"
        lines.append(f"{name:<11}{found['mse']:>9.2e} {r2:>9} {found['mae_percent']:>9.4f}")
    if record["holdout"]:
        lines.append(
            f"held out: the {record['holdout']['points']} points with {record['holdout']['rule']}, "
            f"predicted from the other {record['holdout']['fitted_points']}"
        )
    return lines


def _regression_lines(record: Record) -> list[str]:
    found, ratio = record["regression"], record["tokens_per_parameter"]
    if found is None:
        return []
    return [
        f"exponents by the paper's regression: a {found['a']:.4f}  b {found['b']:.4f}  "
        f"d {found['d']:.4f} ({found['points']} C, {found['edge']} left out at an end of the D)",
        f"best tokens per parameter: {ratio['at_flops']:.3g} at {ratio['flops']:.3g} FLOPs, ~ "
        f"C^{ratio['exponent']:.4f} (regression {ratio['regression_exponent']:.4f})",
    ]


def _doubts(record: Record) -> list[str]:
    lines = []
    for name in _LISTED:
        if names := _names(record, name):
            lines.append(f"{_LISTED[name]}: {', '.join(names[:10])}{' ..' * (len(names) > 10)}")
    return lines


_LISTED = {"excluded": "left out by --drop-highest", "suspects": "far from the law, and kept"}


def _names(record: Record, key: str) -> Sequence[str]:
    return record[key]["points"] if key == "excluded" else record[key]
