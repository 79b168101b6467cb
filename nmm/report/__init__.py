"""One page about a run, from the files it wrote: `python -m nmm.evaluate --run DIR --report`.

No model is loaded, so that it also serves while a run goes on.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from nmm.fault import FILE as FAULTS
from nmm.heartbeat import Phase
from nmm.log import ALARMS, Row, duration, read_losses, read_rows
from nmm.plot import loss_figure, short_count
from nmm.plot.time import time_figure
from nmm.rundir import MANIFEST, wall_time

CSS = Path(__file__).with_name("page.css")
PHASES = [phase for phase in Phase if phase is not Phase.end]
STEP = (Phase.data, Phase.forward, Phase.backward, Phase.optimizer)
MUCH_WAITING_FRACTION = 0.1
MOST_EVALUATIONS = 12


@dataclass(frozen=True)
class Written:
    """What a run directory holds; rows are those of the logs (docs/scaling.md)."""

    directory: Path
    manifest: Row
    losses: list[Row]
    evals: list[Row]
    skipped: list[Row]
    faults: list[Row]
    alarms: list[Row]
    config: str

    @property
    def last(self) -> Row:
        return self.losses[-1]


def write(directory: Path) -> Path:
    """Write report.html into a run directory, which has all it shows in itself."""
    run = _read(directory)
    title = escape(f"{directory.resolve().name}: report")
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{CSS.read_text()}</style></head><body>{_head(run)}{_tiles(run)}{_doubts(run)}"
        f"{_losses(run)}{_held_out(run)}{_time(run)}{_starts(run)}"
        f"<h2>Configuration</h2><details><summary>config.yaml</summary>"
        f"<pre>{escape(run.config)}</pre></details></body></html>\n"
    )
    path = directory / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _read(directory: Path) -> Written:
    losses = read_losses(directory)
    faults = directory / FAULTS
    lines = faults.read_text().splitlines() if faults.exists() else []
    return Written(
        directory=directory,
        manifest=json.loads((directory / MANIFEST).read_text()),
        losses=losses,
        evals=read_rows(directory / "evals.jsonl"),
        skipped=read_rows(directory / "skipped.jsonl"),
        faults=[json.loads(line) for line in lines],
        alarms=read_rows(directory / ALARMS),
        config=(directory / "config.yaml").read_text(),
    )


def _head(run: Written) -> str:
    starts = run.manifest["starts"]
    newest = starts[-1]
    ended = newest.get("ended", {}).get("how", "running, or cut off")
    done, total = run.last["step"], run.manifest["total_steps"]
    commit, *changed = (newest["git_commit"] or "unknown").split("+")
    plural = "" if newest["processes"] == 1 else "es"
    said = (
        f"{ended}, step {done:,} of {total:,} ({run.last['phase']}), {newest['processes']} "
        f"process{plural}, {run.last['wall_time']}; commit {commit[:12]}"
        f"{' with changes' if changed else ''}; written {wall_time()}"
    )
    name = run.directory.resolve().name
    return f'<h1>{escape(name)}</h1><p class="soft">{escape(said)}</p>'


def _tiles(run: Written) -> str:
    rows, last = run.losses, run.last
    tokens, size = last["tokens"], run.manifest["N"]
    found = {
        "parameters (N)": _short(size),
        "tokens": _short(tokens),
        "tokens per parameter": f"{tokens / size:.3g}",
        "training FLOPs": f"{last['flops']:.3g}",
        "training loss, last row": _number(last["loss"]),
        "held-out loss, last": _number(run.evals[-1]["loss"]) if run.evals else "-",
        "tokens per second, median": _short(median(row["tokens_per_second"] for row in rows)),
    }
    rates = [row["mfu"] for row in rows if row.get("mfu") is not None]
    if rates:
        found["MFU, median"] = f"{median(rates):.1%}"
    spent = _spent(run)
    if spent:
        found["time in these rows"] = duration(sum(spent.values()))
        found["of a step, waiting for data"] = f"{_waiting(spent):.1%}"
    peaks = [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]
    if peaks:
        found["peak memory, main process"] = f"{max(peaks) / 2**30:.2f} GiB"
    tiles = (f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in found.items())
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _doubts(run: Written) -> str:
    """What somebody should look at before the numbers are believed."""
    last, found = run.last, []
    if run.skipped:
        steps = ", ".join(str(row["step"]) for row in run.skipped[:8])
        found.append(
            f"Updates that were left out: {len(run.skipped)} (steps {steps}); skipped.jsonl."
        )
    dropped = {k: v for k, v in last.items() if k.startswith("dropped/") and v}
    for key, count in dropped.items():
        reason = key.removeprefix("dropped/")
        found.append(f"Documents that could not be read ({reason}): {count}; quarantine.jsonl.")
    if last.get("skipped_images"):
        found.append(f"Images that were missing from their documents: {last['skipped_images']}.")
    if run.faults:
        ranks = Counter(row["rank"] for row in run.faults)
        said = ", ".join(f"process {rank} ({count})" for rank, count in ranks.items())
        found.append(f"Processes died or hung: {said}; see {FAULTS}.")
    if run.alarms:
        about = Counter(row["about"] for row in run.alarms)
        said = ", ".join(f"{what} ({count})" for what, count in about.items())
        found.append(f"Alarms: {said}; see {ALARMS}.")
    spent = _spent(run)
    if spent and _waiting(spent) > MUCH_WAITING_FRACTION:
        found.append(
            f"{_waiting(spent):.0%} of a step is waiting for data: more data.workers, or a faster "
            f"disk."
        )
    return "".join(f'<p class="doubt">{escape(each)}</p>' for each in found)


def _losses(run: Written) -> str:
    words = "Training losses (light: each row, dark: a running mean), held-out losses as dots."
    picture = _figure(lambda path: loss_figure(run.losses, evals=run.evals, path=path), words=words)
    return f"<h2>Losses</h2>{picture}"


def _held_out(run: Written) -> str:
    """Some evaluations, the first and the last among them."""
    if not run.evals:
        return ""
    keys = [key for key in run.evals[-1] if key == "loss" or key.startswith("loss/kind/")]
    behind = len(run.evals) - 1
    count = min(MOST_EVALUATIONS, len(run.evals))
    places = [round(place * behind / max(1, count - 1)) for place in range(count)]
    head = ["step", "tokens", *(key.removeprefix("loss/kind/") for key in keys)]
    rows = [
        [f"{row['step']:,}", _short(row["tokens"]), *(_number(row.get(key)) for key in keys)]
        for row in (run.evals[place] for place in places)
    ]
    return f"<h2>Held-out losses</h2><p>Nats per token.</p>{_table(head, rows)}"


def _time(run: Written) -> str:
    spent = _spent(run)
    if not spent:
        return ""
    total, steps = sum(spent.values()), sum(spent[phase] for phase in STEP)
    rows = [
        [
            phase.value,
            duration(seconds) if seconds >= 60 else f"{seconds:.2f} s",
            f"{seconds / total:.1%}",
            f"{seconds / steps:.1%}" if phase in STEP else "",
        ]
        for phase, seconds in spent.items()
    ]
    timed, names = _timed(run), [phase.name for phase in PHASES]
    words = (
        "The main process, by its clock. On GPUs, forward and backward are the time to hand over "
        "work; the GPU's own time appears in the optimizer's phase, where a number is awaited."
    )
    picture = _figure(lambda path: time_figure(timed, phases=names, path=path), words=words)
    head = ["phase", "time", "of all", "of steps"]
    return f"<h2>Where the time went</h2>{_table(head, rows)}{picture}"


def _starts(run: Written) -> str:
    rows = []
    for number, start in enumerate(run.manifest["starts"], start=1):
        ended = start.get("ended")
        how = f"{ended['how']} after step {ended['step']:,}" if ended else "cut off, or running"
        rows.append(
            [f"{number}", start["time"], f"{start['step']:,}", f"{start['processes']}", how]
        )
    head = ["start", "time", "after step", "processes", "ended"]
    return f"<h2>Starts</h2>{_table(head, rows)}"


def _timed(run: Written) -> list[Row]:
    """The rows that say where their time went; older versions wrote none."""
    return [row for row in run.losses if f"seconds/{Phase.data.name}" in row]


def _spent(run: Written) -> dict[Phase, float]:
    """Seconds in each phase, over all rows that say so; empty when there is none."""
    rows = _timed(run)
    if not rows:
        return {}
    return {phase: sum(row[f"seconds/{phase.name}"] for row in rows) for phase in PHASES}


def _waiting(spent: dict[Phase, float]) -> float:
    """The fraction of steps in which the main process waits for data."""
    return spent[Phase.data] / sum(spent[phase] for phase in STEP)


def _figure(draw: Callable[[Path], None], *, words: str) -> str:
    """A picture inside the page; PNG, because curves of long runs are large otherwise."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{escape(words)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{x}</tr>" for x in lines)}</table></div>'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(value: float) -> str:
    return short_count(float(f"{value:.3g}"))
