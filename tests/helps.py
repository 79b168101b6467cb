"""Start many commands as a shell would, each in a process of its own, and keep what they print.

    python -m tests.helps COMMANDS.json DIR

COMMANDS is a list like [["train.py", "--help"], ["-m", "nmm.plot", "--help"]]; command N prints to
DIR/N.stdout and DIR/N.stderr, and DIR/codes.json lists the exit codes. The processes are forked
after torch is imported: most of the time of a start, spent only once.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import hydra  # noqa: F401 - for the processes that are forked, as torch is
import torch  # noqa: F401


def become(command: list[str], *, number: int, directory: Path) -> None:
    """Run a command to its end; only an exception that it does not catch comes back from here."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(directory / f"{number}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    code: object = 0
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
    if not isinstance(code, int):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)  # taking torch down takes as long as a start


def main() -> None:
    commands, directory = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    processes = []
    for number, command in enumerate(commands):
        process = os.fork()
        if process == 0:
            become(command, number=number, directory=directory)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    (directory / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
