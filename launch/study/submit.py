"""Hand a study to Slurm: arrays of trunks, arrays of branches that wait for them, the report last.

    #SBATCH --array=0-2                                     three trunks
    #SBATCH --array=0-11 --dependency=afterok:1001_0        the branches of the first one

Jobs continue by themselves after time limits and preemption (`--requeue` of launch.slurm). Which
job trains which run is noted, so that a second submission leaves alone what is in the queue.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from launch import slurm
from launch.study.run import StudyRun
from launch.study.state import STILL, Folder, parent_step, standings_of
from launch.torchrun import ROOT
from nmm.config import StudyConfig
from nmm.errors import UserError

JOBS = "jobs.json"  # by the names of runs, and of the study for its report
NO_ARRAY = "N/A"  # what squeue shows for the task of a job that has none

REPORT = """\
#!/bin/bash
#SBATCH --job-name={name}-report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time={time}
#SBATCH --chdir={root}
#SBATCH --output={output}
{more}# Written by `python -m launch.study`.
{python} -m launch.study report {words}
"""


def submit(
    study: StudyConfig,
    runs: Sequence[StudyRun],
    *,
    folder: Folder,
    words: Sequence[str],
    dry_run: bool,
) -> None:
    """Submit every run that is neither done nor in the queue; `dry_run` prints the scripts."""
    standings = standings_of(runs, folder, retries=study.retries)
    jobs = {} if dry_run else _queued(folder)
    report = jobs.pop(study.name, None)
    todo = [run for run in runs if standings[run.name].state in STILL and run.name not in jobs]
    for batch, after in _batches(todo, jobs):
        text = _script(study, batch, folder=folder, after=after)
        job = _send(text, name=batch[0].name, folder=folder, dry_run=dry_run)
        jobs |= {run.name: f"{job}_{number}" for number, run in enumerate(batch)}
        if not dry_run:
            folder.write(JOBS, json.dumps(jobs, indent=1))
    if todo or (jobs and report is None):
        # One that waits already does not know of the runs that were added; two never write at once.
        after = [*jobs.values(), *([report] if report else [])]
        text = _report(study, folder, after=after, words=words)
        job = _send(text, name=f"the report of {study.name}", folder=folder, dry_run=dry_run)
        if not dry_run:
            jobs[study.name] = f"{job}_{NO_ARRAY}"
            folder.write(JOBS, json.dumps(jobs, indent=1))
    else:
        print("nothing to submit: every run is done, failed or in the queue")


def _batches(
    todo: Sequence[StudyRun], jobs: dict[str, str]
) -> Iterator[tuple[list[StudyRun], str | None]]:
    """Runs of equal shape, and the job they wait for, which `jobs` has by then."""
    free = [run for run in todo if run.trunk is None]
    for _, group in groupby(sorted(free, key=_nodes), key=_nodes):
        yield list(group), None
    bound = [run for run in todo if run.trunk is not None]
    for trunk, group in groupby(bound, key=lambda run: run.trunk):
        yield list(group), jobs.get(str(trunk))


def _nodes(run: StudyRun) -> int:
    return run.cell.nodes


def _script(
    study: StudyConfig, batch: Sequence[StudyRun], *, folder: Folder, after: str | None
) -> str:
    ask, runs = study.slurm, folder.runs.absolute()
    most = "" if ask.most_at_once is None else f"%{ask.most_at_once}"
    words = [
        *("--nodes", str(batch[0].cell.nodes), "--gpus-per-node", str(ask.gpus_per_node)),
        *("--time", ask.time, "--requeue", "--array", f"0-{len(batch) - 1}{most}"),
        *(("--after", after, "--sbatch=--kill-on-invalid-dep=yes") if after else ()),
        *(("--partition", ask.partition) if ask.partition else ()),
        f"--sbatch=--job-name={batch[0].trunk or f'{study.name}-{batch[0].role.value}s'}",
        *(f"--sbatch={word}" for word in ask.sbatch),
    ]
    tasks = {}
    for run in batch:
        step = None if run.trunk is None else parent_step(run, folder)
        tasks[runs / run.name] = run.words(runs=runs, group=study.name, parent_step=step)
    return slurm.script(slurm.parse(words), tasks=tasks)


def _report(
    study: StudyConfig, folder: Folder, *, after: Sequence[str], words: Sequence[str]
) -> str:
    numbers = dict.fromkeys(job.removesuffix(f"_{NO_ARRAY}") for job in after)
    more = [f"--dependency=afterany:{':'.join(numbers)}", *study.slurm.sbatch]
    if study.slurm.partition:
        more.append(f"--partition={study.slurm.partition}")
    said = [word for word in words if not word.startswith(("submit=", "dry_run=", "study.dir="))]
    return REPORT.format(
        name=study.name,
        time=study.slurm.report_time,
        root=ROOT,
        output=folder.runs.absolute() / "slurm" / "%x-%j.out",
        more="".join(f"#SBATCH {word}\n" for word in more),
        python=shlex.quote(sys.executable),
        words=shlex.join([*said, f"study.dir={folder.runs.absolute()}"]),
    )


def _send(text: str, *, name: str, folder: Folder, dry_run: bool) -> str:
    """The number of the job, or in a dry run a word for it."""
    if dry_run:
        print(f"\n{text}", end="")
        return f"JOB[{name}]"
    output: Path = folder.runs.absolute() / "slurm"
    job = slurm.job_of(text, folder=output)
    print(f"submitted job {job}: {name}; its output comes to {output}/", flush=True)
    return job


def _queued(folder: Folder) -> dict[str, str]:
    """What waits or runs of that which was noted when it was submitted."""
    path = folder.notes / JOBS
    noted: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if not noted:
        return {}
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", "--array", "--format=%F_%K"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise UserError("squeue is not there; log in to a machine of the cluster.") from None
    if done.returncode:
        raise UserError(f"squeue does not answer ({' '.join(done.stderr.split())}).")
    there = set(done.stdout.split())
    return {name: job for name, job in noted.items() if job in there}
