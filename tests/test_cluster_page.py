"""docs/cluster.md: sizes are computed, messages those of the code."""

import re
import subprocess
import sys

from tests.test_documentation import ROOT, named, table
from tests.test_structure import files

PAGE = ROOT / "docs" / "cluster.md"
# What torch and Slurm say, in the failure table.
OF_OTHERS = (
    "DataLoader worker ... is killed by signal",
    "RANK 0 ... Watchdog caught collective operation timeout",
    "PENDING (BeginTime)",
    "torchrun failed: RendezvousTimeoutError",
    "torchrun failed: RendezvousConnectionError",
)


def test_the_table_is_what_the_command_prints() -> None:
    program = [sys.executable, "-m", "launch.sizing"]
    printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()
    assert printed.count("\n") > 10
    assert printed in PAGE.read_text()


def test_the_messages_of_the_failure_table_are_those_of_the_code() -> None:
    """Word for word between what differs each time: numbers, names and dots."""
    code = " ".join(path.read_text() for path in files("*.py"))
    code = re.sub(r'"\s+f?"', "", code)  # a sentence over several lines
    messages = {word for row in table(PAGE, first="symptom") for word in named(row[0])}
    messages -= {*OF_OTHERS, "--requeue"}
    assert len(messages) > 7
    for message in sorted(messages):
        literal = re.sub(r"gpu-\d+|SIGKILL( in step \d+, forward)?|(process )?\d+", "...", message)
        words = [part.strip(" ():,") for part in literal.split("...")]
        assert all(part in code for part in words), message
