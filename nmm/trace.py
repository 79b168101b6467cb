"""A trace of some steps by torch's profiler, for https://ui.perfetto.dev or chrome://tracing.

Every process writes its own, in which the phases of its heartbeat have their names.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from nmm.errors import UserError
from nmm.heartbeat import Heartbeat, Phase

FOLDER = "traces"


def refuse_outside(steps: Sequence[int] | None, *, after: int, last: int) -> None:
    """Refuse to trace what a run will not do: it begins after step `after` and ends with `last`."""
    if steps is not None and not (after < steps[0] and steps[1] <= last):
        raise UserError(
            f"log.profile_steps is {list(steps)} and the steps of the run are {after + 1} to "
            f"{last}; choose among them, or leave it out."
        )


@contextmanager
def traced(
    steps: Sequence[int] | None,
    directory: Path,
    *,
    heartbeat: Heartbeat,
    rank: int,
    device: torch.device,
) -> Iterator[None]:
    """Trace the steps from `steps[0]` to `steps[1]` that this process comes to; None: no step."""
    if steps is None:
        yield
        return
    first, last = steps
    path = directory / FOLDER / f"steps_{first}_to_{last}_rank_{rank:05d}.json"
    trace = Trace(range(first, last + 1), path, device=device)
    heartbeat.follow(trace.enter)
    try:
        yield
    finally:
        trace.end()


class Trace:
    """Profiles from the first phase of the first step of `steps` to that of the step after."""

    def __init__(self, steps: range, path: Path, *, device: torch.device) -> None:
        self._steps, self._path = steps, path
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profile: profile | None = None
        self._step, self._phase = ExitStack(), ExitStack()

    def enter(self, phase: Phase, step: int) -> None:
        """The process is now in `phase` of `step`."""
        if self._profile is None and phase is Phase.data and step in self._steps:
            self._profile = profile(activities=self._activities)
            self._profile.start()
        if self._profile is None:
            return
        if step not in self._steps:
            self.end()
            return
        self._phase.close()
        if phase is Phase.data:
            self._step.close()
            self._step.enter_context(record_function(f"step {step}"))
        self._phase.enter_context(record_function(phase.value))

    def end(self) -> None:
        """Write what was traced, if that has not been done; a run does not end for a full disk."""
        if self._profile is None:
            return
        self._phase.close()
        self._step.close()
        done, self._profile = self._profile, None
        done.stop()
        try:
            self._path.parent.mkdir(exist_ok=True)
            beside = self._path.with_suffix(".part")
            done.export_chrome_trace(str(beside))
            beside.replace(self._path)
        except (OSError, RuntimeError) as error:
            print(f"{self._path} was not written: {error}", flush=True)
