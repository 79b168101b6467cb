"""One run on one machine or, by the same command on each, on many.

torchrun starts the processes; this adds what its users need besides: the processes find each other
by address, SIGTERM and SIGUSR1 stop the run with a checkpoint however long that takes, and the exit
code is the run's own: 0 finished, 75 stopped on request, 1 failed.
"""

import argparse
import fcntl
import json
import os
import shlex
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from types import FrameType

from nmm import config
from nmm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    # Else torch's store outlives a restart, with the addresses of processes that are gone.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
# For the first machine to listen, and for all to come; queues and slow disks take their time.
PATIENCE_SECONDS = {"read_timeout": 300, "join_timeout": 1800}
EXIT_CODES = {
    "finished": 0,
    "stopped": 75,
    "diverged": 1,
}  # by what the run notes at its end; without it, 1

SIOCGIFADDR = 0x8915  # of linux/sockios.h: the address of an interface

EXAMPLES = """\
examples:
  python -m launch.torchrun --processes 8 -- run.name=X model=early_275m data=mine
  python -m launch.torchrun --processes 8 --nodes 2 --rendezvous gpu-01:29500 -- run.name=X
        the same command on each of the two machines, in any order
  python -m launch.torchrun --processes 8 --restarts 3 -- run.name=X
        when a process dies, all start again from the last checkpoint, three times at most"""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.chdir(ROOT)
    try:
        words = torchrun_arguments(options)
        directory = ROOT / run_directory(options.overrides)
    except UserError as error:
        sys.exit(f"error: {error}")
    if options.dry_run:
        print(shlex.join(["torchrun", *words]))
        return
    if options.nodes > 1:
        interface = interface_of(own_address(meeting_point(options)[0]))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface or "")  # else by the machine's name
    sys.exit(supervise(words, directory=directory))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.torchrun",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--processes", type=int, required=True, help="on this machine: one per GPU, as a rule"
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (%(default)s)")
    parser.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="one of the machines, and a free port there"
    )
    parser.add_argument(
        "--wait-seconds",
        type=int,
        default=0,
        help="until HOST has an address (%(default)s); pods get theirs one after the other",
    )
    parser.add_argument(
        "--restarts", type=int, default=0, help="after a failure, at most (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    return parser.parse_args(arguments)


def torchrun_arguments(options: argparse.Namespace) -> list[str]:
    """What torchrun is given on this machine; raises UserError."""
    program = [str(ROOT / "train.py"), *options.overrides]
    shape = [f"--nproc-per-node={options.processes}", f"--nnodes={options.nodes}"]
    # SIGTERM stays with us: torchrun would kill all processes 30 seconds later.
    rules = [f"--max-restarts={options.restarts}", "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]
    if options.nodes == 1:
        return [*shape, *rules, "--standalone", "--local-addr=127.0.0.1", *program]
    host, port = meeting_point(options)
    return [*shape, *rules, *rendezvous(host, port=port, here=own_address(host)), *program]


def meeting_point(options: argparse.Namespace) -> tuple[str, int]:
    """(address, port) of the machine where all meet; raises UserError."""
    host, _, port = (options.rendezvous or "").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(
            f"--rendezvous is {options.rendezvous} and --nodes is {options.nodes}; give one of the "
            f"machines and a free port there, for example --rendezvous gpu-01:29500."
        )
    deadline = time.monotonic() + options.wait_seconds
    while True:
        try:
            return socket.gethostbyname(host), int(port)
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(1)
                continue
            raise UserError(
                f"--rendezvous names {host}, which this machine cannot find ({error.strerror}); "
                f"give another of its names, or its address."
            ) from None


def own_address(there: str) -> str:
    """The address of this machine towards that one; raises UserError where no route leads there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((there, 9))  # sends nothing, but chooses the route, and so the address
        except OSError as error:
            raise UserError(
                f"--rendezvous is at {there}, which this machine cannot reach ({error.strerror}); "
                f"give an address in a network that all machines share."
            ) from None
        return probe.getsockname()[0]


def rendezvous(there: str, *, port: int, here: str) -> list[str]:
    """How the machines meet: by address, because names of machines often mislead."""
    conf = [f"{key}={seconds}" for key, seconds in PATIENCE_SECONDS.items()]
    if not here.startswith("127."):  # else several nodes on one machine: the first is the host
        conf.append(f"is_host={int(here == there)}")
    return [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={there}:{port}",
        f"--rdzv-conf={','.join(conf)}",
        f"--local-addr={here}",
    ]


def interface_of(address: str) -> str | None:
    """The network interface that has an address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def run_directory(overrides: list[str]) -> Path:
    """Where the run will live, seen from ROOT; raises UserError for what could not start."""
    return config.run_directory(config.load(config.compose(overrides)).run)


def supervise(words: list[str], *, directory: Path) -> int:
    """Run torchrun, pass on requests to stop, and say how the run ended."""
    stop, asked = directory / "STOP", []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        directory.mkdir(parents=True, exist_ok=True)
        name = signal.Signals(number).name
        stop.write_text(f"{name} was received by the launcher on {socket.gethostname()}")

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, ask)
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    before = len(starts(directory))
    from nmm import elastic  # here, because it imports torch, which takes seconds

    failure = elastic.torchrun(words)
    if asked:
        stop.unlink(missing_ok=True)  # left when the run ended before it looked
    said = failure.told(directory) if failure else None
    return exit_code(starts(directory)[before:], said=said, asked=bool(asked))


def exit_code(new_starts: list[dict], *, said: str | None, asked: bool) -> int:
    """The run's own, from what it noted at its last start; torchrun turns all codes into 1.

    `said` is what torchrun tells of a failure. A run that was asked to stop before it could listen
    was stopped by that, whatever torchrun says.
    """
    noted = new_starts[-1].get("ended") if new_starts else None
    if noted:
        return EXIT_CODES[noted["how"]]
    if said is None:
        return EXIT_CODES["finished"]  # before, so that nothing was started
    if asked:
        return EXIT_CODES["stopped"]
    print(f"the run failed: {said}", file=sys.stderr)
    return 1


def starts(directory: Path) -> list[dict]:
    """What the run noted about its starts so far."""
    manifest = directory / "manifest.json"
    return json.loads(manifest.read_text())["starts"] if manifest.exists() else []


if __name__ == "__main__":
    main()
