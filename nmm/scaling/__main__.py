"""`python -m nmm.scaling`: from runs or tables to laws (docs/scaling.md)."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nmm.errors import UserError
from nmm.scaling import commands, inputs, mixed_commands
from nmm.scaling.fit import DELTA, Solver
from nmm.scaling.phenomena import Settings
from nmm.scaling.record import GRIDS
from nmm.scaling.rules import GPU_BYTES

EXAMPLES = """\
examples:
  python -m nmm.scaling fit --table runs.csv --columns "N=params,D=tokens,L=loss" --out fits/early
  python -m nmm.scaling fit --runs runs --bootstrap 1000 --holdout "N>1e9" --out fits/early
  python -m nmm.scaling fit --runs runs --law mixture --weights text=2,caption=1 --out fits/mix
  python -m nmm.scaling fit-mixed --runs runs --pair text,image --out fits/pair
  python -m nmm.scaling phenomena --runs runs --pair text,image --out fits/pair
  python -m nmm.scaling frontier --runs runs --min-flops 3e19 --out fits/early
  python -m nmm.scaling plan --fit fits/early --flops 1e21 --gpus 64 --mfu 0.4
  python -m nmm.scaling report --fit early=fits/early late=fits/late --out fits/report
  python -m nmm.scaling eta --dense runs/dense --sparse runs/sparse

laws, columns and every key of what is written: docs/scaling.md"""


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    whole = argparse.ArgumentParser(
        prog="python -m nmm.scaling",
        description="Scaling laws from run directories or tables.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    adding = whole.add_subparsers(required=True, metavar="COMMAND")
    _add_fit(adding.add_parser("fit", help="a law of N and D, with intervals and a held-out test"))
    _add_fit_mixed(adding.add_parser("fit-mixed", help="two modalities: competition and synergy"))
    _add_phenomena(adding.add_parser("phenomena", help="pauses and spikes of two modalities"))
    _add_frontier(adding.add_parser("frontier", help="L = k C^c along the lowest losses"))
    _add_plan(adding.add_parser("plan", help="a compute budget -> size, tokens, days, command"))
    _add_report(adding.add_parser("report", help="one page of all fits, figures and numbers"))
    _add_eta(adding.add_parser("eta", help="how many times fewer FLOPs a sparse model needs"))
    return whole


def _add_fit(command: argparse.ArgumentParser) -> None:
    inputs.add_arguments(command)
    command.add_argument("--law", choices=inputs.LAWS, default="chinchilla")
    command.add_argument("--loss", metavar="KEY", help="of runs: one key of evals.jsonl, not all")
    command.add_argument("--delta", type=_positive, default=DELTA, help="of Huber, on the log loss")
    command.add_argument(
        "--drop-highest", type=_count, default=0, metavar="K", help="leave out the K highest losses"
    )
    _add_bootstrap(command)
    command.add_argument(
        "--holdout", metavar="RULE", help='"N>1e9": fit the other points, predict these'
    )
    command.add_argument("--grid", choices=GRIDS, default="nmm", help="where the searches start")
    _add_solver(command)
    command.add_argument(
        "--spaced", choices=("log", "linear"), default="log", help="the D that the regression tries"
    )
    command.add_argument(
        "--vision-coefficient",
        type=_fraction,
        metavar="K",
        help="of late fusion, C = 6 D (N - K N_v); default 1 - D_v/D, and the paper prints 0.483",
    )
    command.add_argument(
        "--weights", metavar="NAME=W,..", help="of mixtures: the losses that should be low"
    )
    command.add_argument(
        "--at", metavar="N=..,D=..", help="of mixtures: for this run; default the largest"
    )
    _add_out(command, run=commands.fit)


def _add_fit_mixed(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", type=Path, help="rows of runs with one modality and with both")
    source.add_argument("--runs", type=Path, metavar="DIR", help="a folder of run directories")
    command.add_argument("--columns", metavar="N=..,D_i=..,D_j=..,L_i=..,L_j=..")
    command.add_argument("--pair", metavar="I,J", help="the two modalities, like text,image")
    command.add_argument(
        "--sources", action="store_true", help="the two are sources of the runs, not modalities"
    )
    command.add_argument("--delta", type=_positive, default=DELTA, help="of Huber, on the log loss")
    _add_bootstrap(command)
    _add_solver(command)
    _add_out(command, run=mixed_commands.fit_mixed)


def _add_phenomena(command: argparse.ArgumentParser) -> None:
    folders = {"type": Path, "metavar": "DIR", "nargs": "+"}
    command.add_argument("--runs", **folders, required=True, help="a folder of runs for every pair")
    command.add_argument("--pair", metavar="I,J", nargs="+", required=True, help="its modalities")
    command.add_argument("--fits", **folders, help="for every pair what fit-mixed wrote")
    usual = Settings()
    command.add_argument("--window", type=_several, default=usual.window_rows, help="logged rows")
    command.add_argument(
        "--least-drop", type=float, default=usual.least_drop, help="nats a window, else paused"
    )
    command.add_argument(
        "--spike-window", type=_several, default=usual.spike_rows, help="logged rows before a spike"
    )
    command.add_argument("--spread", type=float, default=usual.spread, help="MADs of a spike")
    _add_out(command, run=mixed_commands.phenomena_command)


def _add_frontier(command: argparse.ArgumentParser) -> None:
    inputs.add_arguments(command)
    command.add_argument("--loss", metavar="KEY", help="of runs: one key of evals.jsonl, not all")
    _add_min_flops(command)
    _add_bootstrap(command)
    _add_out(command, run=commands.frontier_command)


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fit", type=Path, required=True, metavar="DIR", help="with fit.json")
    command.add_argument("--of", default="loss", metavar="TITLE", help="which of its fits")
    command.add_argument("--flops", type=float, required=True, help="to spend on training, 1e21")
    command.add_argument("--gpus", type=int, default=8)
    command.add_argument("--gpu", choices=GPU_BYTES, default="H100")
    command.add_argument("--mfu", type=float, default=0.4, help="fraction of the GPUs' bf16 peak")
    command.add_argument("--family", default="early", help="presets conf/model/FAMILY_*.yaml")
    command.add_argument("--data", default="mix_45_45_10", help="a group of conf/data")
    command.set_defaults(run=commands.plan)


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fit", nargs="+", required=True, metavar="NAME=DIR", help="what fit wrote, by family"
    )
    _add_min_flops(command)
    _add_out(command, run=commands.report)


def _add_eta(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dense", type=Path, required=True, metavar="RUN")
    command.add_argument("--sparse", type=Path, required=True, metavar="RUN")
    command.add_argument("--held-out", action="store_true", help="held-out losses, not training's")
    command.set_defaults(run=commands.eta_command)


def _add_min_flops(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--min-flops",
        type=_positive,
        default=1.0,
        help="fit the frontier above; arXiv 2504.07951 takes 3e19",
    )


def _add_solver(command: argparse.ArgumentParser) -> None:
    solvers = [solver.value for solver in Solver]
    command.add_argument(
        "--solver", choices=solvers, default=Solver.batched.value, help="lbfgs is the papers' own"
    )


def _add_bootstrap(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bootstrap", type=_count, default=0, metavar="R", help="resamples for 95 %% intervals"
    )
    command.add_argument("--seed", type=_count, default=0, help="of the resamples")


def _add_out(command: argparse.ArgumentParser, *, run: object) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to write")
    command.set_defaults(run=run)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _several(text: str) -> int:
    value = int(text)
    if value < 3:
        raise argparse.ArgumentTypeError(f"{text} is below 3")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    try:
        given.run(given)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
