"""A fit for people: its parameters, its evidence and its doubts, as lines of text."""

from collections.abc import Sequence

from nmm.scaling.files import Record


def table(record: Record, *, title: str) -> str:
    """For people."""
    lines = [title, f"{record['law']} law, {record['points']} points, delta {record['delta']:g}"]
    spread = record["intervals"]
    for name, value in {**record["parameters"], **record["exponents"]}.items():
        low_high = f"   [{spread[name][0]:.6g}, {spread[name][1]:.6g}]" if name in spread else ""
        lines.append(f"  {name:<12}{value:>14.7g}{low_high}")
    agreement = record["agreement"]
    lines.append(
        f"objective {record['objective']:.10e} (sum of Huber), found by "
        f"{agreement['at_best_fraction']:.1%} of {record['starts']:,} starts, largest derivative "
        f"{record['gradient']:.0e}, {record['seconds']:.2f} s"
    )
    if not agreement["confirmed"]:
        lines.append("NOT CONFIRMED: hardly any other start ended at this minimum")
    if best := record.get("best_shares"):
        shares = ", ".join(f"{name} {share:.4f}" for name, share in best["shares"].items())
        lines.append(f"best mixture at N {best['N']:.4g} and D {best['D']:.4g}: {shares}")
    lines += [*_metrics_lines(record), *_regression_lines(record), *_doubts(record)]
    return "\n".join(lines)


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
