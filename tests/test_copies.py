"""Checkpoints copied to a real S3 server that fails on purpose, and taken back on an empty disk."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from nmm import begin, copies, heartbeat
from nmm.checkpoint import complete
from nmm.config import CheckpointConfig, compose, load
from nmm.errors import UserError
from nmm.log import read_rows
from nmm.parallel import World
from nmm.sums import MARKER, write_text
from tests import runs, servers
from tests.launches import wait_until
from tests.train_cases import launch

URL = f"s3://{servers.BUCKET}/runs"
SHORT = (
    *("schedule.total_steps=8", "schedule.warmup_steps=0", "schedule.cooldown_steps=0"),
    *("checkpoint.every_steps=4", "log.wandb=off", "data.workers=0"),
    *("evaluation.every_steps=0", "evaluation.at_start=false", "evaluation.rows_per_source=1"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[servers.FaultyProxy]:
    with servers.s3() as endpoint, servers.faulty_proxy(endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(server: servers.FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> servers.FaultyProxy:
    """Before S3, for this process and those that it starts; it makes no fault yet."""
    settings = {"endpoint_url": server.address, "key": "any", "secret": "any"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    for name, value in settings.items():
        monkeypatch.setenv(f"FSSPEC_S3_{name.upper()}", value)
    server.fail("busy", count=0, match="")
    return server


def made(directory: Path, step: int) -> Path:
    """A checkpoint of two files, and a log beside it."""
    checkpoint = directory / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    names = ("state.json", "states_00000.pt")
    sums = {name: write_text(checkpoint / name, f"{name} of {step}" * 99) for name in names}
    write_text(checkpoint / MARKER, json.dumps(sums))
    write_text(directory / "losses.jsonl", '{"step": 1}\n')
    return checkpoint


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_a_copy_comes_back_to_the_bit_and_is_made_once(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    url, checkpoint = f"{URL}/once", made(tmp_path / "once", 5)
    assert copies.names(url) == []
    assert copies.take_back(url, tmp_path / "none") == (None, [])
    proxy.fail("busy", count=2, match="states_00000")
    copies.put(checkpoint, f"{url}/{checkpoint.name}")
    assert proxy.state()["left"] == 0
    proxy.fail("drop", count=1, match="state.json")
    copies.put(checkpoint, f"{url}/{checkpoint.name}")
    assert proxy.state()["left"] == 1  # nothing was written again
    assert copies.take_back(url, tmp_path / "back") == (checkpoint.name, [])
    assert contents(tmp_path / "back") == contents(tmp_path / "once")


def test_a_copy_without_its_marker_does_not_exist_and_a_changed_one_is_left_out(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    url, system = f"{URL}/left", fsspec.filesystem("s3", skip_instance_cache=True)
    for step in (5, 10, 15):
        path = made(tmp_path / "left", step)
        if step == 15:
            proxy.fail("busy", count=99, match="states_00000")
            with pytest.raises(UserError, match=r"cannot be written .*after 5 tries"):
                copies.put(path, f"{url}/{path.name}")
            proxy.fail("busy", count=0, match="")
        else:
            copies.put(path, f"{url}/{path.name}")
    assert copies.names(url) == ["step_00000005", "step_00000010"]
    system.pipe_file(f"{url}/step_00000010/state.json", b"?")
    said = f"{url}/step_00000010 is damaged (state.json has 1 bytes instead of 1584)"
    expected = ("step_00000005", [f"{said}: going on from step_00000005"])
    assert copies.take_back(url, tmp_path / "back") == expected
    assert [path.name for path in complete(tmp_path / "back")] == ["step_00000005"]
    system.rm_file(f"{url}/step_00000005/states_00000.pt")
    with pytest.raises(UserError, match=r"step_00000010 is damaged .* no other copy is whole"):
        copies.take_back(url, tmp_path / "nothing")
    assert complete(tmp_path / "nothing") == []


@pytest.mark.parametrize("match", ["list-type", "COPIED", "manifest", "states_00000"])
def test_what_may_not_be_read_is_not_missing(
    proxy: servers.FaultyProxy, tmp_path: Path, match: str
) -> None:
    """Else a wrong key would begin a run anew, or go on from an older copy."""
    url = f"{URL}/forbidden"
    for step in (5, 10):
        path = made(tmp_path / "forbidden", step)
        copies.put(path, f"{url}/{path.name}")
    proxy.fail("forbidden", count=999, match=match)
    with pytest.raises(UserError, match=r"may not be read .*correct its name, or the credentials"):
        copies.take_back(url, tmp_path / "back")
    assert complete(tmp_path / "back") == []
    proxy.fail("busy", count=1, match=match)
    assert copies.take_back(url, tmp_path / "back") == ("step_00000010", [])
    assert proxy.state()["left"] == 0


def test_taking_back_goes_on_where_it_was_cut_off(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    """Of whole files nothing is read again, of a half one what is missing."""
    url, path, back = f"{URL}/cut", made(tmp_path / "cut", 5), tmp_path / "back"
    copies.put(path, f"{url}/{path.name}")
    begun = back / "checkpoints" / path.name
    begun.mkdir(parents=True)
    (begun / "state.json.part").write_bytes((path / "state.json").read_bytes())
    whole = (path / "states_00000.pt").read_bytes()
    (begun / "states_00000.pt.part").write_bytes(whole[:100])
    proxy.fail("truncate", count=0, match="")
    assert copies.take_back(url, back) == (path.name, [])
    reads = proxy.state()["reads"]
    assert [name for name in reads if name.endswith("/state.json")] == []
    assert contents(back) == contents(tmp_path / "cut")
    (begun / MARKER).unlink()
    (begun / "states_00000.pt.part").write_bytes(b"of something else")
    assert copies.take_back(url, back) == (path.name, [])
    assert contents(back) == contents(tmp_path / "cut")


def test_a_log_that_is_shorter_than_its_copy_is_replaced(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    url, path, back = f"{URL}/short", made(tmp_path / "short", 5), tmp_path / "back"
    (tmp_path / "short" / "evals.jsonl").write_text('{"step": 1}\n{"step": 5}\n')
    copies.put(path, f"{url}/{path.name}")
    back.mkdir()
    (back / "evals.jsonl").write_text('{"step": 1}\n{"st')
    longer = '{"step": 1}\n{"step": 9}\n'
    (back / "losses.jsonl").write_text(longer)
    assert copies.take_back(url, back) == (path.name, [])
    assert read_rows(back / "evals.jsonl") == [{"step": 1}, {"step": 5}]
    assert (back / "losses.jsonl").read_text() == longer


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ({}, []),
        ({5: [0], 10: [0], 15: [0]}, [5, 10, 15]),
        ({5: [0], 10: [0, 10], 15: [0], 20: [0]}, [5, 10]),
        ({5: [0], 10: [0], 15: [0, 10], 20: [0]}, [5, 10, 15]),
        ({5: [0], 10: [0], 15: [0, 10], 20: [0, 10, 15]}, [5, 10, 15, 20]),
        ({5: [0], 10: [0], 15: [0, 10], 20: [0, 10, 5]}, [5, 20]),
        ({5: [], 10: []}, [5, 10]),
    ],
)
def test_what_a_run_has_abandoned_is_not_on_its_way(
    starts: dict[int, list[int]], expected: list[int]
) -> None:
    named = {f"step_{step:08d}": steps for step, steps in starts.items()}
    assert copies.of_one_line(named) == [f"step_{step:08d}" for step in expected]


def test_copies_of_an_abandoned_line_do_not_come_back(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    """A run that has gone on from an earlier step says so in the copy of that, at its start."""
    url, run = f"{URL}/line", tmp_path / "line"
    checkpoints = {step: made(run, step) for step in (5, 10, 15)}
    (run / "manifest.json").write_text('{"starts": [{"step": 0}]}')
    for path in checkpoints.values():
        copies.put(path, f"{url}/{path.name}")
    assert copies.take_back(url, tmp_path / "before")[0] == "step_00000015"
    (run / "manifest.json").write_text('{"starts": [{"step": 0}, {"step": 5}]}')
    proxy.fail("busy", count=1, match="states_00000")
    copies.put(checkpoints[5], f"{url}/step_00000005")
    assert proxy.state()["left"] == 1  # only what it tells of the run
    assert copies.take_back(url, tmp_path / "after")[0] == "step_00000005"


def test_names_that_lead_out_of_the_run_are_not_followed(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    url = f"{URL}/hostile"
    marker = json.dumps({"../../../out": [0, 0], MARKER: [0, 0]})
    system.pipe_file(f"{url}/step_00000005/{copies.COPIED}", marker.encode())
    system.pipe_file(f"{url}/step_../{copies.COPIED}", marker.encode())
    assert copies.names(url) == ["step_00000005"]
    with pytest.raises(UserError, match=r"COPIED cannot be read"):
        copies.take_back(url, tmp_path / "a" / "b")
    assert contents(tmp_path) == {}


def test_the_process_beside_ends_with_the_run(proxy: servers.FaultyProxy, tmp_path: Path) -> None:
    """It does not mind SIGTERM, which schedulers send to all."""
    proxy.fail("stall", count=99, match="beside")
    command = [sys.executable, "-m", "nmm.copies", made(tmp_path / "beside", 5), f"{URL}/beside/a"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until(lambda: proxy.state()["reads"], seconds=60, log=tmp_path / "beside/losses.jsonl")
        process.terminate()
        assert process.stdin
        process.stdin.close()
        assert process.wait(60) == 1
    assert copies.names(f"{URL}/beside") == []


def test_only_stores_that_list_what_they_hold() -> None:
    with pytest.raises(UserError, match=r"upload_to is https://host/a; give a folder of an object"):
        CheckpointConfig(upload_to="https://host/a")


def phase_of(run: Path) -> str | None:
    place = heartbeat.read(run, 0)
    return place.phase if place else None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_run_whose_disk_was_lost_goes_on_from_the_store(
    proxy: servers.FaultyProxy, tmp_path: Path, world: World
) -> None:
    """The store fails for a while; the run goes on elsewhere, and is as one that nobody moved.

    Also where there are checkpoints, and all are damaged.
    """
    lost, found, whole = (tmp_path / name / "stored" for name in ("lost", "found", "whole"))

    def words(directory: Path, *more: str) -> list[str]:
        name = f"run.name={directory.name}"
        return runs.overrides(runs.corpus(), directory.parent, name, *SHORT, *more)

    there = f"checkpoint.upload_to={URL}"
    proxy.fail("busy", count=copies.TRIES, match="pieces.json")
    shorter = words(lost, there, "schedule.total_steps=6")
    again = words(found, there)
    these = [shorter, again, again, words(whole)]
    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(launch, these, directory=tmp_path)
        wait_until(lambda: phase_of(lost) == "end", seconds=100, log=tmp_path / "runs.json")
        # It waits for the store, in no phase that would say something else of a process that hangs.
        assert "finished" not in (lost / "console.log").read_text()
        said = launched.result()
    assert f"copied step_00000006 to {URL}/stored" in (lost / "console.log").read_text()
    (alarm,) = read_rows(lost / "alarms.jsonl")
    assert (alarm["about"], alarm["step"]) == ("upload", 4)
    assert "pieces.json cannot be written (" in alarm["reason"]
    assert alarm["reason"].endswith("The next try is in 1 seconds")
    assert f"took step_00000006 back from {URL}/stored" in said
    assert f"continuing {found} after step 6 of 8" in said
    assert runs.rows(found / "losses.jsonl") == runs.rows(whole / "losses.jsonl")
    assert runs.rows(found / "evals.jsonl")[-1] == runs.rows(whole / "evals.jsonl")[-1]
    starts = json.loads((found / "manifest.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 6]
    assert copies.take_back(f"{URL}/stored", tmp_path / "third") == ("step_00000008", [])
    taken = contents(tmp_path / "third" / "checkpoints")
    assert taken.items() <= contents(found / "checkpoints").items()
    # The command that found the run finished has copied what was missing: how it ended.
    manifests = [(path / "manifest.json").read_text() for path in (tmp_path / "third", found)]
    assert manifests[0] == manifests[1]

    for path in complete(found):
        (path / "pieces.json").write_text("{}")
    asked = load(compose(again))
    begun = begin.begin(begin.make_plan(asked, world=world), asked, world=world)
    last = found / "checkpoints" / "step_00000008"
    assert begun.own == last
    assert contents(last) == contents(tmp_path / "third" / "checkpoints" / last.name)
    assert len(begun.left_out) == 2
    for line in begun.left_out:
        assert "is damaged (pieces.json has 2 bytes instead of" in line
        assert line.endswith("going on from step_00000008")
