"""What a run says: rows of JSON on disk (the truth), wandb (their mirror) and the console.

The only importer of wandb.
"""

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nmm.config import LogConfig, WandbMode
from nmm.errors import UserError
from nmm.heartbeat import Heartbeat
from nmm.rundir import wall_time

Row = dict[str, Any]
ALARMS = "alarms.jsonl"
LINES_AT_ONCE = 100  # of a log that is read
BLOCK_BYTES = 2**16
SECONDS_BETWEEN_LINES = 5.0  # of a pipe; console.log has every row


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a log, without a half-written last line; none when there is no file."""
    if not path.exists():
        return []
    lines = list(_complete_lines(path))
    parts = (lines[first : first + LINES_AT_ONCE] for first in range(0, len(lines), LINES_AT_ONCE))
    return [row for part in parts for row in _parsed_lines(part, path=path)]


def read_losses(run: Path) -> list[Row]:
    """The rows of losses.jsonl of a run directory, at least one; UserError without."""
    rows = read_rows(run / "losses.jsonl")
    if not rows:
        raise UserError(
            f"{run / 'losses.jsonl'} has no rows; give the directory of a run that has trained for "
            f"a step."
        )
    return rows


class Lines:
    """A file that whole lines are added to; what a full disk refuses waits for the next line.

    Opening cuts off the half line that a kill may have left, to which the next would be added.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o666)
        self._synced_bytes = _end_of_lines(self._file)
        self._waiting = bytearray()  # for the file
        self._unsynced = bytearray()  # in the file, and maybe not on the disk
        self._cut()

    def write(self, line: str) -> None:
        self._waiting += f"{line}\n".encode()
        with suppress(OSError):
            self._flush()

    def sync(self) -> None:
        """All lines are on the disk when this returns, and outlive the machine; raises OSError."""
        self._flush()
        try:
            os.fsync(self._file)
        except OSError:
            # Nobody knows what of it is there, and the next fsync would not say it again.
            self._waiting, self._unsynced, self._is_to_cut = self._unsynced, bytearray(), True
            with suppress(OSError):  # else before the next line
                self._cut()
            raise
        self._synced_bytes += len(self._unsynced)
        self._unsynced.clear()

    def close(self) -> None:
        with suppress(OSError):
            self._flush()
        os.close(self._file)

    def _cut(self) -> None:
        """What is behind the synced lines is written again."""
        os.ftruncate(self._file, min(self._synced_bytes, os.fstat(self._file).st_size))
        self._is_to_cut = False

    def _flush(self) -> None:
        if self._is_to_cut:
            self._cut()
        while self._waiting:
            written = os.write(self._file, self._waiting)
            self._unsynced += self._waiting[:written]
            del self._waiting[:written]


def _end_of_lines(file: int) -> int:
    """The size of a file without a half line at its end."""
    end = os.fstat(file).st_size
    while end:
        begin = max(0, end - BLOCK_BYTES)
        newline = os.pread(file, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


class JsonLog:
    """One JSON object a line, each with a `step`.

    Opening cuts off rows after `keep_until_step` and half lines.
    """

    def __init__(self, path: Path, *, keep_until_step: int) -> None:
        if path.exists():
            kept = [
                line
                for line in _complete_lines(path)
                if _parsed(line, path=path)["step"] <= keep_until_step
            ]
            # Written beside and renamed, so that a kill here leaves the old file or the new one.
            beside = path.with_suffix(".cut")
            with beside.open("w") as file:
                file.write("".join(kept))
                file.flush()
                os.fsync(file.fileno())  # else a machine that loses power may leave neither
            beside.replace(path)
        self._lines = Lines(path)

    def write(self, row: Row) -> None:
        """Append a row; unless the disk is full it is in the file, whole, when this returns."""
        self._lines.write(json.dumps(_finite(row), allow_nan=False))

    def sync(self) -> None:
        """All rows are on the disk when this returns; raises OSError."""
        self._lines.sync()

    def close(self) -> None:
        self._lines.close()


def _finite(row: Row) -> Row:
    """JSON has no infinity and no not-a-number: they become null."""
    floats = {key for key, value in row.items() if isinstance(value, float)}
    return {k: None if k in floats and not math.isfinite(v) else v for k, v in row.items()}


def _parsed_lines(lines: list[str], *, path: Path) -> list[Row]:
    """All at once, which is a quarter faster; one by one where that finds a fault, to name it."""
    try:
        rows = json.loads(f"[{','.join(lines)}]")
    except ValueError:
        rows = []
    if len(rows) == len(lines) and all(map(_is_row, rows)):
        return rows
    return [_parsed(line, path=path) for line in lines]


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and isinstance(row.get("step"), int)


def _parsed(line: str, *, path: Path) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not _is_row(row):
        raise UserError(
            f"{path} has a line that is no row ({line.strip()[:40]!r}); remove that line, or "
            f"restore the file."
        )
    return row


def _complete_lines(path: Path) -> Iterator[str]:
    with path.open(errors="replace") as lines:
        yield from (line for line in lines if line.endswith("\n"))


class WandbMirror:
    """Copies rows to wandb; its first failure is printed and ends the copying, not the training."""

    def __init__(self, config: LogConfig, *, directory: Path, name: str, settings: Row) -> None:
        self._run: Any = None
        self._service: Any = None
        if config.wandb is WandbMode.off:
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            # Here, because its import takes seconds that a run without it should not pay.
            import wandb

            self._service = wandb
            self._run = wandb.init(
                project=config.wandb_project,
                group=config.wandb_group,
                name=name,
                id=wandb_id(directory),
                dir=directory,
                mode=config.wandb.value,
                resume="allow",
                config=settings,
                notes=notes_of(settings),
                # The address of the code may hold a token; manifest.json names the commit.
                settings=wandb.Settings(disable_git=True),
            )
            for part in ("train", "eval"):
                self._run.define_metric(f"{part}/*", step_metric=f"{part}/step")
        except Exception as error:
            self._give_up(error)

    def write(self, row: Row, *, prefix: str) -> None:
        if self._run is not None:
            try:
                self._run.log({f"{prefix}/{key}": value for key, value in row.items()})
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)
        if self._service is not None:
            # Else it ends at exit, with a page when a scheduler's SIGTERM has ended it before.
            with suppress(Exception):
                self._service.teardown()

    def _give_up(self, error: Exception) -> None:
        self._run = None
        print(f"wandb is switched off for this run: {error}", file=sys.stderr)


def wandb_id(directory: Path) -> str:
    """The same for every start of a run."""
    return f"{directory.name}-{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"


def notes_of(settings: Row) -> str | None:
    """The link from a run to its parent: its name, its step, and its id in wandb."""
    parent = settings.get("parent") or {}
    if not parent.get("run"):
        return None
    directory = Path(parent["run"]).absolute()
    return (
        f"{parent['mode']} of {directory.name} at step {parent['step']}, "
        f"wandb id {wandb_id(directory)}"
    )


class Console:
    """A progress bar on a terminal; one plain line a logged row in console.log (and on pipes)."""

    def __init__(self, path: Path, *, first_step: int, total_steps: int) -> None:
        self._lines = Lines(path)
        self._tty = sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not self._tty,
            dynamic_ncols=True,
            smoothing=0.05,
        )
        self.total_steps = total_steps
        self._rows, self._seconds_per_step = 0, 0.0
        self._shown_at = -SECONDS_BETWEEN_LINES

    def row(self, row: Row) -> None:
        """Show a row of losses.jsonl."""
        done = row["step"]
        # A moving mean over about 20 rows; the first is forgotten, because it waits for the start.
        weight = 1.0 if self._rows < 2 else max(0.05, 1 / self._rows)
        self._seconds_per_step += weight * (row["seconds"] - self._seconds_per_step)
        self._rows += 1
        losses = {k.rsplit("/", 1)[1]: v for k, v in row.items() if k.startswith("loss/modality/")}
        shown = "  ".join(f"loss {name} {_number(value)}" for name, value in losses.items())
        line = (
            f"step {done}/{self.total_steps}  tokens {row['tokens']:,}  {shown}  "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        short = "  ".join(f"loss {name} {_number(value)}" for name, value in losses.items())
        counts = (_short(row["tokens"]), _short(row["tokens_per_second"]))
        self._bar.set_postfix_str(f"{counts[0]} tokens  {short}  {counts[1]}/s", refresh=False)
        self._bar.update(done - self._bar.n)
        eta = (self.total_steps - done) * self._seconds_per_step
        now = time.monotonic()
        shown = now - self._shown_at >= SECONDS_BETWEEN_LINES or done == self.total_steps
        self._shown_at = now if shown else self._shown_at
        self._write(f"{line}  lr {row['lr']:.2e}  ETA {duration(eta)}", shown=shown)

    def say(self, text: str) -> None:
        """Show a sentence above the bar."""
        if self._tty:
            self._bar.write(text, file=sys.stderr)
        self._write(text, shown=True)

    def sync(self) -> None:
        """All lines are on the disk when this returns; raises OSError."""
        self._lines.sync()

    def close(self) -> None:
        self._bar.close()
        self._lines.close()

    def _write(self, line: str, *, shown: bool) -> None:
        self._lines.write(line)
        if shown and not self._tty:
            try:
                print(line, flush=True)
            except BrokenPipeError:  # the reader has left; the files have everything
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it serves until the end
            except OSError:
                return  # its disk is full, too


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as short as they can be: 3:07 or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _short(count: float) -> str:
    """1_500_000 -> "1.5M", to fit a bar into 80 columns."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


class RunLog:
    """All outlets of a run, on the main process; on the others every call does nothing.

    Each process has its `heartbeat`, though.
    """

    def __init__(
        self,
        directory: Path,
        config: LogConfig,
        *,
        is_main: bool,
        settings: Row,
        first_step: int,
        total_steps: int,
        heartbeat: Heartbeat,
    ) -> None:
        self._is_main, self.heartbeat = is_main, heartbeat
        if not is_main:
            return
        # A run from scratch also writes its evaluation of step 0 anew.
        keep_until_step = first_step if first_step > 0 else -1
        self._losses, self._evals, self._quarantine, self._skipped = (
            JsonLog(directory / f"{name}.jsonl", keep_until_step=keep_until_step)
            for name in ("losses", "evals", "quarantine", "skipped")
        )
        self._alarms = Lines(directory / ALARMS)
        self._wandb = WandbMirror(
            config, directory=directory, name=directory.name, settings=settings
        )
        self._console = Console(
            directory / "console.log", first_step=first_step, total_steps=total_steps
        )

    def losses(self, row: Row) -> None:
        """A row of losses.jsonl (docs/scaling.md)."""
        if self._is_main:
            self._losses.write(row)
            self._wandb.write(row, prefix="train")
            self._console.row(row)

    def evaluation(self, row: Row) -> None:
        """A row of evals.jsonl (docs/scaling.md)."""
        if self._is_main:
            self._evals.write(row)
            self._wandb.write(row, prefix="eval")
            kinds = {k.rsplit("/", 1)[1]: v for k, v in row.items() if k.startswith("loss/kind/")}
            shown = "  ".join(f"{kind} {_number(value)}" for kind, value in kinds.items())
            ahead = f", {_number(row['ahead/loss'])} looking ahead" if "ahead/loss" in row else ""
            loss = f"{_number(row['loss'])}{ahead}"
            self.say(f"held-out loss at step {row['step']}: {loss}  ({shown})")

    def quarantine(self, row: Row) -> None:
        """A document that was planned and could not be read (docs/scaling.md)."""
        if self._is_main:
            self._quarantine.write(row)

    def skipped(self, row: Row) -> None:
        """An update that was left out because it was no number (docs/scaling.md)."""
        if self._is_main:
            self._skipped.write(row)
            numbers = f"loss {_number(row['loss'])}, gradient norm {row['grad_norm']}"
            self.say(f"the update of step {row['step']} was left out: {numbers}")

    def alarm(self, text: str, *, step: int, about: str) -> None:
        """What somebody should look at, though the run goes on (docs/scaling.md)."""
        if self._is_main:
            row = {"time": wall_time(), "step": step, "about": about, "reason": text}
            self._alarms.write(json.dumps(row))
            self.say(f"ALARM: {text}")

    def sync(self) -> None:
        """All rows are on the disk when this returns, those it has refused too; raises OSError."""
        if self._is_main:
            rows = (self._losses, self._evals, self._quarantine, self._skipped)
            for log in (*rows, self._alarms, self._console):
                log.sync()

    def say(self, text: str) -> None:
        """A sentence for the person who watches."""
        if self._is_main:
            self._console.say(text)

    def close(self) -> None:
        if self._is_main:
            files = (self._losses, self._evals, self._quarantine, self._skipped)
            for outlet in (*files, self._alarms, self._wandb, self._console):
                outlet.close()
