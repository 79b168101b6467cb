"""torchrun in this process, without the pages that it prints when a process ends."""

import logging
import signal

from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def torchrun(arguments: list[str]) -> str | None:
    """Run torchrun to its end: None if all processes succeeded, else what it has to say.

    Processes that could say a sentence have said it; what is said here is that they failed.
    """
    logging.disable(logging.ERROR)
    try:
        torch_run.main(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"process {rank} {how}"
    except SignalException as error:
        return f"{signal.Signals(error.sigval).name} was received"
    except Exception as error:
        # RendezvousTimeoutError and others, whose message may be empty.
        return f"torchrun failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None
