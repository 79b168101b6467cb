"""A scaling study as one command: plan, run, continue, fit, report (docs/scaling.md)."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.study.costs import rates
from launch.study.local import Local
from launch.study.plan import plan_runs
from launch.study.results import write_results
from launch.study.run import StudyRun
from launch.study.state import Folder, State, refuse_other_runs, standings_of
from launch.study.submit import submit
from launch.study.table import plan_text, problems, status_text
from launch.torchrun import EXIT_CODES
from nmm.config import StudyCommand, StudyConfig, Submit, compose_study
from nmm.config.root import CONF
from nmm.errors import UserError

USAGE = """\
usage: python -m launch.study [status|retry|report] study=NAME [key=value ...]

{doc}

  study=NAME                    a file of conf/study/: {studies}
  dry_run=true                  print the plan: runs, parameters, tokens, FLOPs, hours, disk
  submit=slurm                  arrays of jobs, branches after their trunks, the report at the end
  study.max_minutes=30          stop with checkpoints; the same command continues
  study.parallel=2              runs at a time on this machine
  study.dir=runs                where the runs are, and in a folder NAME the notes and results
  study.token_budgets=[1_000_000,...]  any key of nmm/config/study.py

  status                        where every run stands
  retry                         runs that failed too often may fail as often again, then go on
  report                        table, laws and figures of what is finished

exit codes: 0 everything is finished, 75 stopped on request, 1 runs failed or are missing"""

COMMANDS = ("run", "status", "retry", "report")


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"--help", "-h"} & set(words):
        print(USAGE.format(doc=__doc__, studies=", ".join(names())))
        return
    try:
        named = words.pop(0) if "=" not in words[0] else "run"
        if named not in COMMANDS:
            raise UserError(f"{named} is no command; choose of: {', '.join(COMMANDS)}.")
        code = do(named, compose_study(words), words=words)
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)


def names() -> list[str]:
    """The studies that there are."""
    return sorted(path.stem for path in (CONF / "study").glob("*.yaml"))


def do(named: str, command: StudyCommand, *, words: list[str]) -> int:
    """The exit code."""
    study = command.study
    runs = plan_runs(study)
    folder = Folder(Path(study.dir), study.name)
    if command.dry_run:
        print(plan_text(study, runs, rates=rates(runs, folder, device=study.device)))
        if command.submit is Submit.slurm:
            submit(study, runs, folder=folder, words=words, dry_run=True)
        return 0
    if named == "status":
        print(status(study, runs, folder=folder))
        return 0
    refuse_other_runs(runs, folder)
    with folder.lock():
        if named == "retry":
            folder.forget_failures()
        if named == "report":
            return results(study, runs, folder=folder, words=words)
        if command.submit is Submit.slurm:
            submit(study, runs, folder=folder, words=words, dry_run=False)
            return 0
        if not Local(study, runs, folder).go():
            print("the same command continues", flush=True)
            return EXIT_CODES["stopped"]
        return results(study, runs, folder=folder, words=words)


def status(study: StudyConfig, runs: Sequence[StudyRun], *, folder: Folder) -> str:
    found = standings_of(runs, folder, retries=study.retries)
    return status_text(runs, found, rates=rates(runs, folder, device=study.device))


def results(
    study: StudyConfig, runs: Sequence[StudyRun], *, folder: Folder, words: Sequence[str]
) -> int:
    """Write what there is; 1 when runs are missing that are not left out."""
    standings = standings_of(runs, folder, retries=study.retries)
    write_results(study, runs, standings, folder=folder)
    for line in problems(runs, standings):
        print(line)
    missing = [
        run for run in runs if standings[run.name].state not in (State.finished, State.left_out)
    ]
    if missing:
        status = f"python -m launch.study status {shlex.join(words)}"
        print(f"{len(missing)} runs are not done; `{status}` says more")
    return 1 if missing else 0


if __name__ == "__main__":
    main()
