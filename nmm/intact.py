"""Is a checkpoint still as it was written? Every file is compared with what COMPLETE says of it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch

from nmm.checkpoint import FORMAT, STATE, complete, refuse_format
from nmm.engine import Engine
from nmm.errors import UserError
from nmm.parallel import World, agreed, from_main, gather_lists, is_of_a_collective
from nmm.pieces import Written
from nmm.sums import MARKER, Sum, fault_of

# What reading raises on files that are missing or hold something else. A program that is wrong
# raises the same, and torch a RuntimeError for a file that is cut and for a failing GPU alike.
DAMAGE = (
    FileNotFoundError,
    EOFError,
    AssertionError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    UnpicklingError,
)
DELETE = "delete it, and the same command continues from the checkpoint before it"
SET_ASIDE = "DAMAGED"  # the marker of a checkpoint that was found so; the next save removes it


@dataclass(frozen=True)
class Found:
    """The newest intact `checkpoint`, if there is one, and what is wrong with newer ones."""

    checkpoint: Path | None
    faults: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What the user should know."""
        if self.checkpoint is None:
            return []
        return [f"{fault}: going on from {self.checkpoint.name}" for fault in self.faults]


def newest_intact(
    directory: Path, *, world: World | None = None, has_copies: bool = False
) -> Found:
    """The newest complete checkpoint of a run directory that is as it was written.

    Raises UserError where there are some and none is intact, unless the run may have copies. The
    processes of a `world`, which goes on from it, call it together, and the damaged ones are set
    aside.
    """
    found = complete(directory) if world is None or world.is_main else []
    found = found if world is None else from_main(found)
    faults: list[str] = []
    for checkpoint in reversed(found):
        fault = fault_in(checkpoint, world=world)
        if fault is None:
            if world and world.is_main:
                for later in found[found.index(checkpoint) + 1 :]:
                    (later / MARKER).rename(later / SET_ASIDE)
            return Found(checkpoint, faults)
        faults.append(fault)
    if faults and not has_copies:
        raise UserError(
            f"{faults[0]}, and no other checkpoint is intact; restore {directory / 'checkpoints'}, "
            f"or start another run with run.name=NEW."
        )
    return Found(None, faults)


def refuse_damaged(checkpoint: Path, *, remedy: str, world: World | None = None) -> None:
    """Raises UserError, on all processes of a `world` together."""
    if fault := fault_in(checkpoint, world=world):
        raise UserError(f"{fault}; {remedy}.")


def fault_in(checkpoint: Path, *, world: World | None = None) -> str | None:
    """What is wrong with a complete checkpoint, if anything is; a `world` shares the reading.

    Raises UserError for a checkpoint of another version.
    """
    if world is None:
        faults = _faults(checkpoint, part=0, parts=1)
    else:
        part, parts = world.rank, world.size
        mine = agreed(lambda: _faults(checkpoint, part=part, parts=parts), world=world)
        faults = gather_lists(mine)
    return f"{checkpoint} is damaged ({faults[0]})" if faults else None


def _faults(checkpoint: Path, *, part: int, parts: int) -> list[str]:
    """Of every file whose number leaves the rest `part` when it is divided by `parts`."""
    try:
        written = json.loads((checkpoint / STATE).read_text())["format"]
    except (OSError, ValueError, LookupError, TypeError):
        written = FORMAT  # what is wrong with the file is found below
    refuse_format(written, checkpoint=checkpoint)
    try:
        sums = json.loads((checkpoint / MARKER).read_text())
        mine = [(name, Sum(*sums[name])) for name in sorted(sums)[part::parts]]
    except (FileNotFoundError, ValueError, LookupError, TypeError) as error:
        return [f"{MARKER} cannot be read: {error}"]
    except OSError as error:
        raise UserError(_unreadable(checkpoint, error)) from None
    try:
        found = [fault_of(checkpoint / name, expected=expected) for name, expected in mine]
    except OSError as error:
        raise UserError(_unreadable(checkpoint, error)) from None
    return [fault for fault in found if fault]


def _unreadable(checkpoint: Path, error: OSError) -> str:
    return (
        f"{checkpoint} cannot be read ({error}); bring its disk back or, if it is lost for good, "
        f"move this checkpoint away, and give the same command again."
    )


def load(
    engine: Engine, checkpoint: Path, *, say: Callable[[str], None], remedy: str = DELETE
) -> Written:
    """Weights and optimizer state of a complete checkpoint, into the engine."""
    with damage_of(checkpoint, remedy=remedy):
        return engine.load(checkpoint, say=say)


@contextmanager
def damage_of(checkpoint: Path, *, remedy: str = DELETE) -> Iterator[None]:
    """A file that is no part of a checkpoint becomes one sentence; what else fails stays as it is.

    Nobody is told to delete a checkpoint because a memory was full, a disk was away, or a program
    is wrong: what it reads is damaged only if a file is not as it was written.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # it would take minutes to read all files, only to find them whole
    except UnpicklingError as error:  # what none of us has written, whatever COMPLETE says
        reason = str(error).strip().splitlines()[:1]
        raise UserError(f"{checkpoint} is damaged ({''.join(reason)}); {remedy}.") from error
    except (*DAMAGE, RuntimeError) as error:
        fault = None if is_of_a_collective(error) else fault_in(checkpoint)
        if fault is None:
            raise
        raise UserError(f"{fault}; {remedy}.") from error
    except OSError as error:
        raise UserError(_unreadable(checkpoint, error)) from error
