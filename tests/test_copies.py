"""Checkpoints copied to a real S3 server that fails on purpose, and taken back on an empty disk."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

import train
from nmm import begin, copies, heartbeat, take_back
from nmm.checkpoint import Progress, complete
from nmm.config import CheckpointConfig, compose, load
from nmm.errors import UserError
from nmm.log import read_rows
from nmm.parallel import World
from nmm.stop import Stops
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


def starts_of(text: str) -> list[take_back.Start]:
    """Of "0@1 10@2": at step 0 in year 1, at step 10 in year 2."""
    pairs = (word.split("@") for word in text.split())
    return [(f"200{year}-01-01T00:00:00+00:00", int(step)) for step, year in pairs]


def write_manifest(run: Path, starts: str) -> None:
    found = [{"time": time, "step": step} for time, step in starts_of(starts)]
    (run / "manifest.json").write_text(json.dumps({"starts": found}))


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_a_copy_comes_back_to_the_bit_and_is_made_once(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    url, checkpoint = f"{URL}/once", made(tmp_path / "once", 5)
    assert take_back.names(url) == []
    assert take_back.newest(url, tmp_path / "none") == (None, [])
    proxy.fail("busy", count=2, match="states_00000")
    copies.put(checkpoint, f"{url}/{checkpoint.name}")
    assert proxy.state()["left"] == 0
    proxy.fail("drop", count=1, match="state.json")
    copies.put(checkpoint, f"{url}/{checkpoint.name}")
    assert proxy.state()["left"] == 1  # nothing was written again
    assert take_back.newest(url, tmp_path / "back") == (checkpoint.name, [])
    assert contents(tmp_path / "back") == contents(tmp_path / "once")


@pytest.mark.parametrize("file", ["COPIED", "manifest"])
def test_a_store_that_is_busy_has_not_said_what_is_missing(
    proxy: servers.FaultyProxy, tmp_path: Path, file: str
) -> None:
    """A copy that was left behind must not come back because nobody could ask."""
    url, run = f"{URL}/busy-{file}", tmp_path / "run"
    for step in (5, 15):
        path = made(run, step)
        write_manifest(run, "0@1")
        copies.put(path, f"{url}/{path.name}")
    proxy.fail("busy", count=99, match=f"step_00000015/{file}")
    with pytest.raises(UserError, match=r"cannot be read .*after 5 tries"):
        take_back.newest(url, tmp_path / "back")
    proxy.fail("busy", count=0, match="")
    assert take_back.newest(url, tmp_path / "back") == ("step_00000015", [])


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
    assert take_back.names(url) == ["step_00000005", "step_00000010"]
    system.pipe_file(f"{url}/step_00000010/state.json", b"?")
    said = f"{url}/step_00000010 is damaged (state.json has 1 bytes instead of 1584)"
    expected = ("step_00000005", [f"{said}: going on from step_00000005"])
    assert take_back.newest(url, tmp_path / "back") == expected
    assert [path.name for path in complete(tmp_path / "back")] == ["step_00000005"]
    system.rm_file(f"{url}/step_00000005/states_00000.pt")
    with pytest.raises(UserError, match=r"step_00000010 is damaged .* no other copy is whole"):
        take_back.newest(url, tmp_path / "nothing")
    assert complete(tmp_path / "nothing") == []


@pytest.mark.parametrize("match", ["list-type", "COPIED", "manifest", "states_00000"])
def test_what_may_not_be_read_is_not_missing(
    proxy: servers.FaultyProxy, tmp_path: Path, match: str
) -> None:
    """Else a wrong key would begin a run anew, or go on from an older copy."""
    url = f"{URL}/forbidden"
    for step in (5, 10):
        path = made(tmp_path / "forbidden", step)
        write_manifest(tmp_path / "forbidden", "0@1")
        copies.put(path, f"{url}/{path.name}")
    proxy.fail("forbidden", count=999, match=match)
    with pytest.raises(UserError, match=r"may not be read .*correct its name, or the credentials"):
        take_back.newest(url, tmp_path / "back")
    assert complete(tmp_path / "back") == []
    proxy.fail("busy", count=1, match=match)
    assert take_back.newest(url, tmp_path / "back") == ("step_00000010", [])
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
    assert take_back.newest(url, back) == (path.name, [])
    reads = proxy.state()["reads"]
    assert [name for name in reads if name.endswith("/state.json")] == []
    assert contents(back) == contents(tmp_path / "cut")
    (begun / MARKER).unlink()
    (begun / "states_00000.pt.part").write_bytes(b"of something else")
    assert take_back.newest(url, back) == (path.name, [])
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
    assert take_back.newest(url, back) == (path.name, [])
    assert read_rows(back / "evals.jsonl") == [{"step": 1}, {"step": 5}]
    assert (back / "losses.jsonl").read_text() == longer


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ({}, []),
        ({5: "0@1", 10: "0@1", 15: "0@1"}, [5, 10, 15]),
        ({5: "0@1", 10: "0@1 10@2", 15: "0@1", 20: "0@1"}, [5, 10]),
        ({5: "0@1", 10: "0@1", 15: "0@1 10@2", 20: "0@1"}, [5, 10, 15]),
        ({5: "0@1", 10: "0@1", 15: "0@1 10@2", 20: "0@1 10@2 15@3"}, [5, 10, 15, 20]),
        ({5: "0@1", 10: "0@1", 15: "0@1 10@2", 20: "0@1 10@2 5@3"}, [5, 20]),
        ({5: "", 10: ""}, [5, 10]),
        # the manifest was moved away at step 20, and before a start from 10
        ({10: "0@1", 15: "0@1 10@2", 20: "20@3", 30: "20@3"}, [10, 15, 20, 30]),
        ({10: "0@1 5@2", 15: "0@1 5@2 10@3", 20: "0@1", 25: "10@4"}, [10, 25]),
        ({10: "10@4", 15: "0@1 5@2 10@3", 20: "0@1"}, [10]),
        # an older manifest came back with the disk
        ({20: "0@1 20@5", 25: "0@1 10@3 20@4", 100: "0@1 20@5"}, [20, 100]),
        # a copy that tells nothing, and a clock that was put back
        ({10: "0@1", 15: "", 20: "0@1 10@2"}, [10, 15, 20]),
        ({10: "0@5", 20: "0@5", 15: "0@5 10@2"}, [10, 15]),
    ],
)
def test_what_a_run_has_abandoned_is_not_on_its_way(
    starts: dict[int, str], expected: list[int]
) -> None:
    named = {f"step_{step:08d}": starts_of(text) for step, text in starts.items()}
    assert take_back.of_one_line(named) == [f"step_{step:08d}" for step in expected]


def test_copies_of_an_abandoned_line_do_not_come_back(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    """A run that has gone on from an earlier step says so in the copy of that, at its start."""
    url, run = f"{URL}/line", tmp_path / "line"
    checkpoints = {step: made(run, step) for step in (5, 10, 15)}
    write_manifest(run, "0@1")
    for path in checkpoints.values():
        copies.put(path, f"{url}/{path.name}")
    assert take_back.newest(url, tmp_path / "before")[0] == "step_00000015"
    write_manifest(run, "0@1 5@2")
    proxy.fail("busy", count=1, match="states_00000")
    copies.put(checkpoints[5], f"{url}/step_00000005")
    assert proxy.state()["left"] == 1  # only what it tells of the run
    assert take_back.newest(url, tmp_path / "after")[0] == "step_00000005"
    assert (tmp_path / "after/manifest.json").read_bytes() == (run / "manifest.json").read_bytes()


@pytest.mark.parametrize("match", ["losses", "manifest", "COPIED"])
def test_a_copy_serves_while_its_logs_are_written_anew(
    proxy: servers.FaultyProxy, tmp_path: Path, match: str
) -> None:
    """A store that fails then, or a kill, leaves the copy as it was."""
    run, url = tmp_path / "run", f"{URL}/anew/{len(match)}"
    path = made(run, 5)
    write_manifest(run, "0@1")
    copies.put(path, f"{url}/{path.name}")
    before = contents(run)
    (run / "losses.jsonl").write_text('{"step": 1}\n{"step": 5}\n')
    write_manifest(run, "0@1 5@2")
    proxy.fail("forbidden", count=99, match=match)
    with pytest.raises(UserError, match=r"may not be written"):
        copies.put(path, f"{url}/{path.name}")
    proxy.fail("busy", count=0, match="")
    assert take_back.newest(url, tmp_path / "old") == (path.name, [])
    assert contents(tmp_path / "old") == before
    (run / "losses.jsonl").write_text('{"step": 1}\n{"step": 6}\n')
    copies.put(path, f"{url}/{path.name}")
    assert take_back.newest(url, tmp_path / "new") == (path.name, [])
    assert contents(tmp_path / "new") == contents(run)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    found = [name for name in system.ls(f"{url}/{path.name}") if name.endswith(".jsonl")]
    assert len(found) == 1  # the old ones are gone, also those that no copy has named


def test_logs_that_another_process_begins_meanwhile_stay(
    proxy: servers.FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is about to name them; a marker without what it names would be of a damaged copy."""
    run, url = tmp_path / "run", f"{URL}/meanwhile"
    path, write = made(run, 5), copies.remote.write
    system, others = fsspec.filesystem("s3", skip_instance_cache=True), "losses.0a1b2c3d.jsonl"
    write_manifest(run, "0@1")

    def and_another(name: str, *arguments: Any, **more: Any) -> None:
        if name.endswith(copies.COPIED):
            system.pipe_file(f"{url}/{path.name}/{others}", b"")
        write(name, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(copies.remote, "write", and_another)
        copies.put(path, f"{url}/{path.name}")
    assert system.exists(f"{url}/{path.name}/{others}")


def test_copies_whose_logs_have_plain_names_are_read(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    run = tmp_path / "plain"
    path = made(run, 5)
    write_manifest(run, "0@1")
    url, system = f"{URL}/plain", fsspec.filesystem("s3", skip_instance_cache=True)
    whole = {**{file.name: file for file in path.iterdir()}, **{f.name: f for f in run.glob("*.*")}}
    sums = {name: write_text(file, file.read_text()) for name, file in whole.items()}
    for name, file in whole.items():
        system.pipe_file(f"{url}/{path.name}/{name}", file.read_bytes())
    system.pipe_file(f"{url}/{path.name}/{copies.COPIED}", json.dumps(sums).encode())
    assert take_back.newest(url, tmp_path / "back") == (path.name, [])
    assert contents(tmp_path / "back") == contents(run)
    copies.put(path, f"{url}/{path.name}")
    assert f"{path.name}/losses.jsonl" not in str(system.find(url))
    assert take_back.newest(url, tmp_path / "again") == (path.name, [])
    assert contents(tmp_path / "again") == contents(run)


def test_those_who_may_not_list_can_put(proxy: servers.FaultyProxy, tmp_path: Path) -> None:
    """S3 then says of what is not there that it may not be read; taking back wants to know."""
    url, path = f"{URL}/unlisted", made(tmp_path / "unlisted", 5)
    proxy.fail("forbidden", count=1, match="COPIED")
    copies.put(path, f"{url}/{path.name}")
    assert proxy.state()["left"] == 0
    assert take_back.names(url) == [path.name]


def test_nothing_here_is_removed_for_a_copy_that_is_not_whole(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    url, run = f"{URL}/both", tmp_path / "both"
    path = made(run, 5)
    copies.put(path, f"{url}/{path.name}")
    whole = (path / "state.json").read_bytes()
    (path / "state.json").write_text("?")
    (path / "notes").mkdir()
    (path / "notes" / "mine").write_text("a")
    before = contents(run)
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.pipe_file(f"{url}/{path.name}/state.json", b"!")
    with pytest.raises(UserError, match=r"state.json has 1 bytes .* no other copy is whole"):
        take_back.newest(url, run)
    assert contents(run) == before
    system.pipe_file(f"{url}/{path.name}/state.json", whole)
    assert take_back.newest(url, run) == (path.name, [])
    state = str((path / "state.json").relative_to(run))
    assert contents(run) == {**before, state: whole}


def test_names_that_lead_out_of_the_run_are_not_followed(
    proxy: servers.FaultyProxy, tmp_path: Path
) -> None:
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    url = f"{URL}/hostile"
    marker = json.dumps({"../../../out": [0, 0], MARKER: [0, 0]})
    system.pipe_file(f"{url}/step_00000005/{copies.COPIED}", marker.encode())
    system.pipe_file(f"{url}/step_../{copies.COPIED}", marker.encode())
    assert take_back.names(url) == ["step_00000005"]
    with pytest.raises(UserError, match=r"COPIED cannot be read"):
        take_back.newest(url, tmp_path / "a" / "b")
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
    assert take_back.names(f"{URL}/beside") == []


def test_the_last_copy_ends_nothing_and_is_ended_by_a_stop(
    proxy: servers.FaultyProxy,
    tmp_path: Path,
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, run = f"{URL}/asked", tmp_path / "asked"
    path = made(run, 5)
    words = runs.overrides(runs.corpus(), tmp_path, "run.name=asked", f"checkpoint.upload_to={URL}")
    settings = load(compose(words))
    asked, not_asked = (Stops(run, max_minutes=None, world=world) for _ in range(2))
    asked.receive(signal.SIGTERM, None)

    def said(stops: Stops) -> str:
        begun = begin.Beginning(Progress(step=5), own=path)
        train.copy_last(settings, begun, directory=run, stops=stops)
        printed = capsys.readouterr()
        assert printed.out == f"copying {path.name} to {url}, where it is not there yet\n"
        return printed.err

    alarm = f"ALARM: {path.name} is not copied"
    because = "because SIGTERM was received; the same command copies it."
    assert said(asked) == f"{alarm}, {because}\n"
    (run / "evals.jsonl").symlink_to("/proc/self/mem")  # it opens, and reading it is an error
    assert said(not_asked).startswith(f"{alarm}: [Errno 5]")
    assert take_back.names(url) == []
    (run / "evals.jsonl").unlink()
    assert said(not_asked) == ""
    assert take_back.names(url) == [path.name]


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
    assert take_back.newest(f"{URL}/stored", tmp_path / "third") == ("step_00000008", [])
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
