"""Ports for servers, which the system gives to nobody else before they are used."""

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

FIRST, LAST = 10_000, 60_000
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    (port,) = free_ports(1)
    return port


def free_ports(count: int) -> list[int]:
    """Different from each other and free just now.

    They lie below those that the system gives to whoever asks for any: one of these may be
    somebody's before the server that it is meant for has started.
    """
    system = int(RANGE.read_text().split()[0])
    end = system if system > FIRST + 1000 else LAST  # some machines give nearly all to whoever asks
    draw = random.SystemRandom()  # tests that run at once must not draw the same
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            probe, port = stack.enter_context(socket.socket()), draw.randrange(FIRST, end)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found
