"""torchrun in this process, without the pages that it prints when a process ends."""

import logging
import signal
from pathlib import Path
from typing import NamedTuple

from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from nmm import heartbeat


class Failure(NamedTuple):
    """What torchrun has to say, and the process that was killed, if one was."""

    said: str
    rank: int | None = None
    pid: int | None = None

    def told(self, directory: Path) -> str:
        """With what the process was doing; its file may be one of an earlier start."""
        place = None if self.rank is None else heartbeat.read(directory, self.rank)
        if place is None or place.pid != self.pid:
            return self.said
        return f"{self.said} {place.sentence()}"


def torchrun(arguments: list[str]) -> Failure | None:
    """Run torchrun to its end: None if all processes succeeded.

    Processes that could say a sentence have said it; what is said here is that they failed.
    """
    logging.disable(logging.ERROR)
    try:
        torch_run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if code >= 0:
            return Failure(f"process {rank} ended with {code}")
        how = f"process {rank} was killed by {signal.Signals(-code).name}"
        return Failure(how, rank=rank, pid=failure.pid)
    except SignalException as error:
        return Failure(f"{signal.Signals(error.sigval).name} was received")
    except Exception as error:
        # RendezvousTimeoutError and others, whose message may be empty.
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Failure(f"torchrun failed: {said}")
    return None
