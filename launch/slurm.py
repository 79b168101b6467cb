"""Submit a run to Slurm: one sbatch script, that starts launch.torchrun on every node.

Before the time limit, and when a job of higher priority takes the nodes, the run stops with a
checkpoint; with --requeue the job then goes back into the queue by itself and continues.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.torchrun import EXIT_CODES, ROOT, run_directory
from nmm.errors import UserError

TASK = "{task}"
STAND_IN = 999_999_937  # for the number of an array's task, until the job knows it

EXAMPLES = """\
examples:
  python -m launch.slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 --requeue -- run.name=X
        with the overrides of train.py after the --
  python -m launch.slurm --nodes 1 --gpus-per-node 8 --time 4:00:00 --after 1234 -- run.name=Y
        begins when job 1234 has finished its run
  python -m launch.slurm --nodes 1 --gpus-per-node 8 --time 4:00:00 --array 0-3%2 \\
      -- run.name=seed_{task} run.seed={task}
        four runs, two at a time
  python -m launch.slurm ... --sbatch=--account=lab --sbatch=--exclusive -- run.name=X
  python -m launch.slurm ... --dry-run -- run.name=X        prints the script and submits nothing"""

SCRIPT = """\
#!/bin/bash
{directives}
# Written by `python -m launch.slurm`.
set -u
{choice}

# Slurm's signal before the time limit; a signal to this shell reaches no other process.
stop() {{ mkdir -p "$run" && echo "the time limit of job $SLURM_JOB_ID" >"$run/STOP"; }}
trap stop USR1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*')
port=$((20000 + SLURM_JOB_ID % 10000))

# In the background, because bash keeps a signal until a command in the foreground ends.
srun {srun} \\
  {python} -m launch.torchrun --processes {processes} --restarts {restarts} \\
  --nodes "$SLURM_NNODES" --rendezvous "${{address#NodeAddr=}}:$port" \\
  -- {overrides} &
step=$!
while true; do
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break
done
{requeue}exit "$code"
"""

REQUEUE = """
# Stopped and not cancelled: the state of a cancelled job is no longer RUNNING.
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}
job=${{job:-$SLURM_JOB_ID}}
if [ "$code" = {stopped} ] && scontrol show job "$job" | grep -q 'JobState=RUNNING'; then
  scontrol requeue "$job"
fi
"""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        text = script(options)
        if options.dry_run:
            print(text, end="")
            return
        print(submit(text, folder=output_folder(directory_of(options))))
    except UserError as error:
        sys.exit(f"error: {error}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, help="0 trains on CPUs, for trying things out"
    )
    parser.add_argument("--processes", type=int, help="per node (as many as GPUs, at least 1)")
    parser.add_argument("--time", required=True, metavar="HH:MM:SS", help="limit of the job")
    parser.add_argument(
        "--stop-seconds",
        type=int,
        default=300,
        help="before the limit the run is asked to stop (%(default)s); a checkpoint must fit in",
    )
    parser.add_argument("--requeue", action="store_true", help="continue after stops by itself")
    parser.add_argument(
        "--restarts", type=int, default=0, help="after a failure, within the job (%(default)s)"
    )
    parser.add_argument("--after", metavar="JOBID", help="begin when that job has succeeded")
    parser.add_argument("--array", metavar="0-3%2", help="one run per number, for {task} below")
    parser.add_argument("--partition", help="of the cluster")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=--OPTION", help="one more for sbatch"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    return parser.parse_args(arguments)


def script(options: argparse.Namespace, *, tasks: Mapping[Path, list[str]] | None = None) -> str:
    """The sbatch script; raises UserError for what could not start.

    With `tasks`, task N of the array is the run of their N-th directory, with the overrides there;
    options.overrides are not read.
    """
    if seconds(options.time) <= options.stop_seconds:
        raise UserError(
            f"--time is {options.time} and --stop-seconds is {options.stop_seconds}, so the run "
            f"would be asked to stop as soon as it starts; lower --stop-seconds or raise --time."
        )
    uses_task = any(TASK in word for word in options.overrides)
    if tasks is None and uses_task != bool(options.array):
        raise UserError(
            f"--array is {options.array} and {TASK} is {'' if uses_task else 'not '}among the "
            f"overrides; give both, for example --array 0-3 -- run.name=seed_{TASK}."
        )
    directory = directory_of(options) if tasks is None else next(iter(tasks))
    overrides = quoted(for_task(options.overrides, task=STAND_IN))
    requeue = REQUEUE.format(stopped=EXIT_CODES["stopped"]) if options.requeue else "\n"
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in directives(options, run=directory)),
        choice=f"run={quoted([str(directory)])}" if tasks is None else choice_of(tasks),
        srun=" ".join(srun_options(options)),
        python=shlex.quote(sys.executable),
        processes=processes(options),
        restarts=options.restarts,
        overrides=overrides if tasks is None else '"${overrides[@]}"',
        requeue=requeue,
    )


def choice_of(tasks: Mapping[Path, list[str]]) -> str:
    """Bash that sets `run` and `overrides` by the number of the array's task."""
    cases = [
        f"{number}) run={quoted([str(directory)])} overrides=({quoted(words)}) ;;"
        for number, (directory, words) in enumerate(tasks.items())
    ]
    return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"])


def directory_of(options: argparse.Namespace) -> Path:
    """Where the run will live, with STAND_IN for the number of the task."""
    return ROOT / run_directory(for_task(options.overrides, task=STAND_IN))


def seconds(time: str) -> int:
    """A time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; raises UserError."""
    days, _, clock = time.rpartition("-")
    parts = clock.split(":")
    if len(parts) > 3 or not all(part.isdigit() for part in [days or "0", *parts]):
        raise UserError(f"--time is {time}; give it like 24:00:00 or 2-12:00:00.")
    hours_first = bool(days) or len(parts) == 3
    units = (3600, 60, 1) if hours_first else (60, 1)
    of_clock = sum(int(part) * unit for part, unit in zip(parts, units, strict=False))
    return 86_400 * int(days or "0") + of_clock


def directives(options: argparse.Namespace, *, run: Path) -> list[str]:
    output = "%x-%A_%a.out" if options.array else "%x-%j.out"
    chosen = {
        "--gpus-per-node": options.gpus_per_node or None,
        "--dependency": options.after and f"afterok:{options.after}",
        "--array": options.array,
        "--partition": options.partition,
    }
    return [
        f"--job-name={run.name.replace(f'{STAND_IN}', '').strip('_-.') or 'run'}",
        f"--nodes={options.nodes}",
        "--ntasks-per-node=1",
        f"--time={options.time}",
        f"--signal=B:USR1@{options.stop_seconds}",
        "--requeue" if options.requeue else "--no-requeue",
        "--open-mode=append",
        f"--chdir={ROOT}",
        f"--output={output_folder(run) / output}",
        *(f"{option}={value}" for option, value in chosen.items() if value),
        *options.sbatch,
    ]


def srun_options(options: argparse.Namespace) -> list[str]:
    """The other nodes get two minutes to end when one has; srun does not pass on CPUs per task."""
    cpus = [word for word in options.sbatch if word.startswith(("--cpus-per-task", "-c"))]
    return ["--kill-on-bad-exit=0", "--wait=120", *cpus]


def processes(options: argparse.Namespace) -> int:
    return options.processes or max(1, options.gpus_per_node)


def output_folder(run: Path) -> Path:
    """Beside the runs: a run's own directory belongs to the run and may not exist yet."""
    return run.parent / "slurm"


def for_task(overrides: list[str], *, task: int) -> list[str]:
    return [word.replace(TASK, str(task)) for word in overrides]


def quoted(words: list[str]) -> str:
    """Words for bash, with the number of the array's task where its stand-in is."""
    parts = ([part and shlex.quote(part) for part in word.split(f"{STAND_IN}")] for word in words)
    return " ".join('"$SLURM_ARRAY_TASK_ID"'.join(word) for word in parts)


def submit(text: str, *, folder: Path) -> str:
    """Hand the script to sbatch and say what came of it; raises UserError."""
    job = job_of(text, folder=folder)
    return (
        f"submitted job {job}; its output comes to {folder}/; `scancel {job}` ends it with a "
        "checkpoint"
    )


def job_of(text: str, *, folder: Path) -> str:
    """The number of the job that sbatch makes of a script; raises UserError when it refuses it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError("sbatch is not there; log in to a machine of the cluster.") from None
    if done.returncode:
        raise UserError(f"sbatch refused the job ({' '.join(done.stderr.split())}).")
    return done.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    main()
