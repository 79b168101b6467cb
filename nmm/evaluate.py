"""Held-out losses of a run: `python -m nmm.evaluate --run runs/X`.

With --report, a page about the run instead (nmm/report); with --experts, which experts take which
of the held-out tokens (nmm/specialisation.py).
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from data.tokenizer import Tokenizer
from nmm import report, specialisation
from nmm.config import read_yaml
from nmm.errors import UserError
from nmm.held_out import AHEAD, HeldOut, objective
from nmm.image_gap import image_gap
from nmm.model.depth import flip
from nmm.rundir import CONFIG
from nmm.tally import Row
from nmm.trained import Trained, add_arguments, read

NOT_CAUSAL = """\
These losses are NOT causal: experts or blocks choose their tokens among all of a row, later ones
too, so that a token's loss depends on what follows it (expert choice, mixture of depths)."""
CAUSAL = f"""\
These losses are causal: auxiliary routers say who takes a token, and know no later one.
Those below {AHEAD} are NOT: there it is chosen among all tokens of a row, as in training."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nmm.evaluate",
        description="Held-out losses of a trained model, in nats per token.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    parser.add_argument(
        "--image-gap",
        action="store_true",
        help="also the loss of captions with the images of other documents: do images matter?",
    )
    parser.add_argument(
        "--rows-per-source", type=int, help="most rows of each source (default: as the run)"
    )
    parser.add_argument(
        "--masked",
        action="store_true",
        help="score the causal masked objective of the training, not documents in their order",
    )
    parser.add_argument(
        "--data-of",
        type=Path,
        metavar="RUN",
        help="the held-out documents of another run, whose ids have the same meanings",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="instead: one HTML page from the run's files, DIR/report.html",
    )
    parser.add_argument(
        "--experts",
        action="store_true",
        help="instead: which experts take which tokens, as a picture and tables in DIR",
    )
    parser.add_argument(
        "--depth-noise",
        type=float,
        metavar="FRACTION",
        help="of a mixture of depths: turn this fraction of who is taken round, by a draw",
    )
    parser.add_argument("--noise-seed", type=int, default=0, help="of that draw (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.report:
        _report(arguments)
        return
    if arguments.rows_per_source is not None and arguments.rows_per_source < 1:
        sys.exit(f"error: --rows-per-source is {arguments.rows_per_source}; set it to 1 or more.")
    try:
        if arguments.experts:
            _experts(arguments)
            return
        trained = read(arguments)
        if arguments.data_of is not None:
            trained = with_data_of(trained, arguments.data_of)
        row = _evaluate(
            trained,
            rows_per_source=arguments.rows_per_source,
            with_gap=arguments.image_gap,
            masked=arguments.masked,
            depth_noise=arguments.depth_noise,
            noise_seed=arguments.noise_seed,
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps(row))
        return
    where = arguments.run or arguments.export
    print(f"{where}, step {row.pop('step')}: held-out loss in nats per token")
    if "causal" in row:
        print(CAUSAL if row["causal"] else NOT_CAUSAL)
    for key, value in row.items():
        shown = f"{value:.4f}" if isinstance(value, float) else "-" if value is None else value
        print(f"  {key:32} {shown}")


def _report(arguments: argparse.Namespace) -> None:
    """The page of a run; nothing is evaluated."""
    others = {
        "--export": arguments.export,
        "--step": arguments.step,
        "--rows-per-source": arguments.rows_per_source,
        "--image-gap": arguments.image_gap or None,
        "--masked": arguments.masked or None,
        "--data-of": arguments.data_of,
        "--depth-noise": arguments.depth_noise,
        "--json": arguments.json or None,
        "--experts": arguments.experts or None,
    }
    given = [flag for flag, value in others.items() if value is not None]
    try:
        if given:
            raise UserError(
                f"--report shows what a run has written and evaluates nothing, but {given[0]} was "
                f"given; leave it out, and give --run."
            )
        print(f"wrote {report.write(arguments.run)}")
    except UserError as error:
        sys.exit(f"error: {error}")


def _experts(arguments: argparse.Namespace) -> None:
    """Which experts take which held-out tokens; raises UserError."""
    others = {
        "--image-gap": arguments.image_gap,
        "--masked": arguments.masked,
        "--json": arguments.json,
        "--data-of": arguments.data_of is not None,
        "--depth-noise": arguments.depth_noise is not None,
    }
    for flag, given in others.items():
        if given:
            raise UserError(
                f"--experts writes tables and a picture and no losses, but {flag} was given; leave "
                f"one of them out."
            )
    trained = read(arguments)
    rows = arguments.rows_per_source or trained.config.evaluation.rows_per_source
    found = specialisation.of_run(trained, trained.open_held_out(), rows_per_source=rows)
    directory = arguments.run or arguments.export
    title = f"{trained.name}, step {trained.step}: held-out tokens by expert"
    lines = specialisation.score_lines(found)
    print("specialisation of the experts, 0 (alike) to 1 (each for one modality)")
    print(f"{'kind':12} {'layer':>5} {'as they are':>12} {'equal parts':>12}")
    for line in lines:
        shown = ("-" if x is None else f"{x:.4f}" for x in (line.specialisation, line.normalised))
        print(f"{line.kind:12} {line.layer:5} " + " ".join(f"{x:>12}" for x in shown))
    for path in specialisation.write(
        found, trained.config.model.moe, directory=directory, title=title
    ):
        print(f"wrote {path}")


def _evaluate(
    trained: Trained,
    *,
    rows_per_source: int | None,
    with_gap: bool,
    masked: bool,
    depth_noise: float | None = None,
    noise_seed: int = 0,
) -> Row:
    device = next(trained.model.parameters()).device
    data = trained.config.data
    rows = rows_per_source or trained.config.evaluation.rows_per_source
    if masked and with_gap:
        raise UserError(
            "--masked scores documents with moved spans and --image-gap scores captions in their "
            "order, so that their losses do not compare; give one of them."
        )
    if masked and not data.masking.mean_spans:
        raise UserError(
            "--masked scores the objective of data.masking, but data.masking.mean_spans was 0 in "
            "the training; leave it out."
        )
    if depth_noise is not None:
        _flip(trained, fraction=depth_noise, seed=noise_seed)
    corpus = trained.open_held_out()
    sums = HeldOut.zeros(trained.config.model, num_sources=len(corpus.sources), device=device)
    sources = trained.held_out_batches(corpus, rows_per_source=rows, masked=masked)
    dropped = sums.add_all(trained.model, sources)
    said = objective(data, masked=masked)
    losses = sums.row(corpus, units=data.units)
    row = {"step": trained.step, **losses, **said, "dropped": len(dropped)}
    if depth_noise is not None:
        row |= {"depth_noise": depth_noise, "noise_seed": noise_seed}
    if with_gap:
        row["caption/own_images"], row["caption/other_images"] = image_gap(
            trained, corpus, rows_per_source=rows
        )
    return row


def _flip(trained: Trained, *, fraction: float, seed: int) -> None:
    """Errors in who is taken by the blocks of a mixture of depths, as in "MoMa"."""
    if trained.config.model.mod.every is None:
        raise UserError(
            "--depth-noise turns decisions of a mixture of depths round, but model.mod.every was "
            "null in the training; leave it out."
        )
    if not 0 <= fraction <= 1 or seed < 0:
        raise UserError(
            f"--depth-noise is {fraction} and --noise-seed is {seed}; give a fraction between 0 "
            f"and 1, and a seed of 0 or more."
        )
    flip(trained.model, fraction=fraction, seed=seed)


def with_data_of(trained: Trained, run: Path) -> Trained:
    """The same model, to be evaluated on the sources of another run; raises UserError."""
    own, other = trained.config.data, read_yaml(run / CONFIG).data
    same = trained.tokenizer.hash == Tokenizer(other.tokenizer).hash
    if own.units != other.units or not same:
        raise UserError(
            f"--data-of is {run}, whose tokenizer or data.units are not those of {trained.name}, "
            f"so that ids mean something else there; give a run that has the same."
        )
    config = replace(trained.config, data=replace(own, sources=other.sources))
    return replace(trained, config=config)


if __name__ == "__main__":
    main()
