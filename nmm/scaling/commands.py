"""What the commands of `python -m nmm.scaling` do: read, compute, print, and write at the end."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from nmm.errors import UserError
from nmm.scaling import inputs
from nmm.scaling import plan as planning
from nmm.scaling.eta import eta
from nmm.scaling.files import Record, read_fit, title_of, write, write_fits
from nmm.scaling.fit import Solver
from nmm.scaling.frontier import line_of, line_record
from nmm.scaling.frontier_resamples import frontier_intervals
from nmm.scaling.mixing import at_of, best_of_all, check_mixing, weights_of
from nmm.scaling.points import Points
from nmm.scaling.record import Options, fit_record, flops_of
from nmm.scaling.say import say
from nmm.scaling.words import frontier_table, mixture_table, table


def fit(arguments: argparse.Namespace) -> None:
    """A law for every group and, of runs, for every loss: tables, and DIR/fit.json."""
    options = Options(
        delta=arguments.delta,
        drop_highest=arguments.drop_highest,
        resamples=arguments.bootstrap,
        seed=arguments.seed,
        holdout=arguments.holdout,
        grid=arguments.grid,
        solver=Solver(arguments.solver),
        spaced=arguments.spaced,
        vision_coefficient=arguments.vision_coefficient,
        at=at_of(arguments.at),
    )
    weights = weights_of(arguments.weights)
    found = inputs.read(arguments, needed=inputs.needs(arguments.law), loss=arguments.loss)
    check_mixing(arguments, losses=list(found.losses))
    fitted: dict[str, dict[str, Record]] = {}
    for loss, groups in found.losses.items():
        records: dict[str, Record] = {}
        for group, points in groups.items():
            law = inputs.law_of(arguments.law, points=points)
            title = title_of(arguments.group, group=group, loss=loss)
            try:
                records[group] = fit_record(law, points, options=options)
            except UserError as error:
                raise UserError(f"{title}: {error}") from None
            say(table(records[group], title=f"== {title}") + "\n")
        fitted[loss] = records
    mixtures = _best_mixtures(fitted, weights=weights, options=options)
    by_loss = {loss: _grouped(records, arguments=arguments) for loss, records in fitted.items()}
    first, *others = by_loss
    record = by_loss[first] | _about(arguments, left_out=found.left_out)
    if others:
        record["losses"] = {loss: by_loss[loss] for loss in others}
    if mixtures:
        record["best_mixtures"] = mixtures
    write_fits(arguments.out, record)


def _best_mixtures(
    fitted: Mapping[str, Mapping[str, Record]],
    *,
    weights: Mapping[str, float],
    options: Options,
) -> dict[str, Record]:
    """Of mixture laws of several losses: for every group the shares that serve all of them."""
    first = next(iter(fitted.values()))
    found = {}
    for group, one in first.items():
        losses = {loss: records[group] for loss, records in fitted.items() if loss != "loss"}
        if "best_shares" in one and losses:
            found[group] = best_of_all(losses, weights=weights, at=options.at)
            say(mixture_table(found[group], title=group) + "\n")
    return found


def frontier_command(arguments: argparse.Namespace) -> None:
    """L = k C^c along the lowest losses, and isoFLOP parabolas: lines, and DIR/frontier.json."""
    found = inputs.read(arguments, needed=("N", "D"), loss=arguments.loss)
    record: Record = {}
    for loss, groups in found.losses.items():
        for group, points in groups.items():
            title = title_of(arguments.group, group=group, loss=loss)
            record[title] = _frontier(points, arguments=arguments)
            say(frontier_table(record[title], title=title))
    about = _about(arguments, left_out=found.left_out)
    write(arguments.out / "frontier.json", {"frontiers": record, **about})


def _frontier(points: Points, *, arguments: argparse.Namespace) -> Record:
    runs = {"flops": flops_of(points), "loss": points.loss, "size": points.columns["N"]}
    line = line_of(**runs, least_flops=arguments.min_flops)
    record = line_record(line) | {"intervals": {}}
    if arguments.bootstrap:
        record["intervals"] = frontier_intervals(
            line,
            **runs,
            least_flops=arguments.min_flops,
            resamples=arguments.bootstrap,
            seed=arguments.seed,
        )
        record["bootstrap"] = {"resamples": arguments.bootstrap, "seed": arguments.seed}
    return record


def eta_command(arguments: argparse.Namespace) -> None:
    """A line per loss."""
    for found in eta(arguments.dense, arguments.sparse, held_out=arguments.held_out):
        if found.flops is None:
            say(f"{found.loss}: the sparse run never reaches {found.dense_loss:.4f}")
        else:
            seconds = "unknown" if found.seconds is None else f"{found.seconds:.2f}"
            say(
                f"{found.loss}: eta {found.flops:.2f} by FLOPs, {seconds} by the clock "
                f"(loss {found.dense_loss:.4f}, reached at step {found.matched_step:.0f})"
            )


def plan(arguments: argparse.Namespace) -> None:
    """A run for a budget, by a law that was fitted."""
    fitted = read_fit(arguments.fit, title=arguments.of)
    budget = planning.Budget(arguments.flops, arguments.gpus, arguments.gpu, arguments.mfu)
    made = planning.make_plan(fitted, budget, family=arguments.family, data=arguments.data)
    say(planning.text(made))


def report(arguments: argparse.Namespace) -> None:
    """All that the commands wrote into some directories, on one page."""
    # Here, because matplotlib takes a second that no other command should pay.
    from nmm.scaling import report as reporting

    directories = []
    for given in arguments.fit:
        name, equals, directory = given.partition("=")
        path = Path(directory if equals else given)
        directories.append((name if equals else path.name, path))
    study = reporting.read_study(directories, least_flops=arguments.min_flops)
    reporting.report(study, out=arguments.out)


def _grouped(records: dict[str, Record], *, arguments: argparse.Namespace) -> Record:
    if arguments.group is None:
        return records[""]
    return {"group": arguments.group, "groups": records}


def _about(arguments: argparse.Namespace, *, left_out: dict[str, str]) -> Record:
    for name, reason in left_out.items():
        say(f"left out: {name}: {reason}")
    source = str(arguments.runs or arguments.table)
    return {"source": source, "columns": arguments.columns, "left_out": left_out}
