"""The page about a run: its numbers are those of the logs, and it needs no other file."""

import base64
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nmm import evaluate, report
from nmm.errors import UserError
from nmm.log import read_rows
from tests import runs

FILES = ("losses.jsonl", "evals.jsonl", "skipped.jsonl", "manifest.json", "config.yaml")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files that a page is made of, below a name that HTML would take for a tag."""
    directory = tmp_path / "a<b>&c"
    directory.mkdir()
    for name in FILES:
        shutil.copy(runs.undisturbed() / name, directory / name)
    return directory


def cells(html: str, title: str) -> list[list[str]]:
    """The table below a heading, its first row included."""
    body = html.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    found = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in body.split("<tr>")[1:]]
    return [[unescape(cell) for cell in row] for row in found]


def test_numbers_are_those_of_the_logs_and_nothing_is_loaded(run: Path) -> None:
    html = report.write(run).read_text()
    losses, evals = read_rows(run / "losses.jsonl"), read_rows(run / "evals.jsonl")
    tiles = dict(
        (name, value) for value, name in re.findall(r"<b>(.*?)</b><span>(.*?)</span>", html)
    )
    assert tiles["training loss, last row"] == f"{losses[-1]['loss']:.4f}"
    assert tiles["held-out loss, last"] == f"{evals[-1]['loss']:.4f}"
    peak = max(row["peak_memory_bytes"] for row in losses)
    assert tiles["peak memory, main process"] == f"{peak / 2**30:.2f} GiB"
    head, *rows = cells(html, "Held-out losses")
    assert head == ["step", "tokens", "loss", "caption", "interleaved", "text"]
    assert [row[0] for row in rows] == [str(row["step"]) for row in evals]
    assert [row[5] for row in rows] == [f"{row['loss/kind/text']:.4f}" for row in evals]
    assert cells(html, "Starts")[1][2:] == ["0", "1", "finished after step 300"]
    count = losses[-1]["dropped/image_decode"]
    assert f"Documents that could not be read (image_decode): {count};" in html
    assert unescape((run / "config.yaml").read_text()) in unescape(html)
    assert "a&lt;b&gt;&amp;c: report" in html
    assert "<b>&c" not in html
    assert set(re.findall(r'(?:src|href)="(.{5})', html)) == {"data:"}


def test_the_time_is_that_of_the_rows(run: Path) -> None:
    html = report.write(run).read_text()
    _, *rows = cells(html, "Where the time went")
    losses = read_rows(run / "losses.jsonl")
    keys = ("start", "data", "forward", "backward", "optimizer", "between", "evaluation")
    sums = [sum(row[f"seconds/{key}"] for row in losses) for key in (*keys, "checkpoint")]
    assert [row[2] for row in rows] == [f"{spent / sum(sums):.1%}" for spent in sums]
    steps = sums[1:5]
    assert [row[3] for row in rows[1:5]] == [f"{spent / sum(steps):.1%}" for spent in steps]
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == 2
    for picture in pictures:
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20  # curves in their colours


def test_a_run_that_goes_on_has_lost_processes_and_old_rows(run: Path) -> None:
    """Without an end, with faults and a row cut in half, and with rows that tell no phases."""
    rows = read_rows(run / "losses.jsonl")
    old = [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]
    lines = [json.dumps(row) + "\n" for row in old]
    (run / "losses.jsonl").write_text("".join(lines[:50]) + lines[50][:40])
    (run / "evals.jsonl").unlink()
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["starts"][-1]["ended"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "faults.jsonl").write_text('{"rank": 3}\n{"rank": 3}\n')
    (run / "skipped.jsonl").write_text('{"step": 7}\n')
    html = report.write(run).read_text()
    assert "running, or cut off, step 50 of 300" in html
    assert "Processes died or hung: process 3 (2)" in html
    assert "Updates that were left out: 1 (steps 7)" in html
    assert "Where the time went" not in html
    assert "Held-out losses" not in html


def test_what_is_no_run_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"has no rows; give the directory of a run that has"):
        report.write(tmp_path)
    asked = ["--run", str(run), "--report"]
    said = "error: --report shows what a run has written and evaluates nothing, but --json was"
    with pytest.raises(SystemExit, match=said):
        evaluate.main([*asked, "--json"])
    evaluate.main(asked)
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
