"""Processes that meet as under torchrun, forked from one that has imported torch already.

The import takes most of the time of a start; here it is spent once for all of them.
"""

import gc
import os
import traceback
from collections.abc import Callable

from nmm import parallel
from nmm.parallel import World
from tests.ports import free_port


def together(work: Callable[[World], None], *, processes: int) -> None:
    """Run `work` in so many processes and wait for them; all must succeed.

    NOTE: only from a process that has started no thread, neither torch's nor a store's.
    """
    # What ZeRO imports at its first use, in a second; not on top, because tests import this file.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    port = free_port()
    gc.freeze()  # what is imported need not be looked at again by each of them
    children = [_fork(work, rank=rank, size=processes, port=port) for rank in range(processes)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * processes, codes


def _fork(work: Callable[[World], None], *, rank: int, size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in meeting.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    code = 1
    try:
        work(parallel.start(timeout_minutes=1))
        parallel.stop()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)  # taking torch down takes as long as a start
