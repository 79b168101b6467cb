"""How fast run directories are read: 10,000 of them, and one log of 100,000 rows.

    python -m bench.runs --run runs/X [--runs 10000] [--rows 100000]

Copies of one run's files, by hard links; the log repeats its last row. CPU time of one core beside
the clock.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nmm.log import read_rows
from nmm.scaling.runs import read_runs

FILES = ("manifest.json", "losses.jsonl", "evals.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    # Beside the run: hard links do not leave a file system.
    with tempfile.TemporaryDirectory(dir=options.run.parent) as folder:
        copies = Path(folder, "copies")
        for number in range(options.runs):
            directory = copies / f"{number:05d}"
            directory.mkdir(parents=True)
            for name in FILES:
                (directory / name).hardlink_to((options.run / name).resolve())
        spent(f"{options.runs:,} runs", lambda: len(read_runs(copies).finished))
        last = json.dumps(read_rows(options.run / "losses.jsonl")[-1]) + "\n"
        log = Path(folder, "long.jsonl")
        log.write_text(last * options.rows)
        what = f"a log of {options.rows:,} rows of {len(last):,} bytes"
        spent(what, lambda: len(read_rows(log)))


def spent(what: str, work: Callable[[], int]) -> None:
    clock, cpu = time.perf_counter(), time.process_time()
    found = work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    print(f"{what}: {clock:.2f} s, {cpu:.2f} s of CPU ({found:,} read)")


if __name__ == "__main__":
    main()
