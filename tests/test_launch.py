"""What launchers would run: printed, checked against schemas, refused in a sentence."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from launch import torchrun
from launch.torchrun import exit_code
from nmm.config import compose, load
from tests.runs import run
from tests.test_structure import our_modules

KUBERNETES = [sys.executable, "-m", "launch.kubernetes", "--gpus-per-node=8", "--image=nmm:1"]
VERSIONS = ("1.31", "1.34", "1.37")  # podFailurePolicy is stable since 1.31


def manifest(*words: str) -> list[dict]:
    done = run([*KUBERNETES, *words])
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifest_is_valid_by_the_published_schemas(version: str) -> None:
    """Strictly: a key that the schema does not know is an error, too."""
    words = ["--nodes=2", "--volume=runs:/nmm/runs", "--volume=corpora:/corpora:ro"]
    documents = manifest(*words, "--namespace=lab", "--", "run.name=x", "schedule.total_steps=5")
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    documents[1]["spec"]["completionMod"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError, match="completionMod"):
        kubernetes_validate.validate(documents[1], version, strict=True)


def test_pods_find_the_first_one_and_run_what_train_accepts() -> None:
    awkward = "data.tokenizer='a b $(HOME)'"
    given = ["run.name=x-1", "schedule.total_steps=5", awkward]
    service, job = manifest("--nodes=3", "--volume=runs:/nmm/runs", "--", *given)
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (3, 3)
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"] == "x-1"
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    (container,) = pod["containers"]
    python, dash_m, module, *words = container["command"]
    assert (python, dash_m, module) == ("python", "-m", "launch.torchrun")
    options = torchrun.parse(words)
    assert options.rendezvous == "x-1-0.x-1:29500"
    assert (options.processes, options.nodes) == (8, 3)
    assert "$$(HOME)" in options.overrides[-1]  # Kubernetes reads $(HOME) as a variable
    settings = load(compose([word.replace("$$(", "$(") for word in options.overrides]))
    assert settings.data.tokenizer == "a b $(HOME)"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "run.name=My_Run"], "run.name is My_Run, which is no name for Kubernetes"),
        (["--", "run.name=x"], "--volume mounts nothing that can be written at /nmm/runs"),
        (["--volume=runs:/nmm/runs:ro", "--", "run.name=x"], "nothing that can be written"),
        (["--volume=runs", "--", "run.name=x"], "--volume is runs; give CLAIM:/PATH"),
        (["--", "model.widht=3"], "Key 'widht' not in 'ModelConfig'"),
    ],
)
def test_what_kubernetes_could_not_run_is_refused(words: list[str], said: str) -> None:
    done = run([*KUBERNETES, *words, "schedule.total_steps=5"])
    assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (1, 1, True)


def torchrun_words(*words: str) -> list[str]:
    program = [sys.executable, "-m", "launch.torchrun", "--processes=4", "--dry-run"]
    done = run([*program, *words, "--", "run.name=x", "schedule.total_steps=5"])
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def test_what_torchrun_is_given_is_printed() -> None:
    alone = torchrun_words("--restarts=2")
    assert {"--standalone", "--nproc-per-node=4", "--max-restarts=2"} <= {*alone}
    assert alone[-3:] == [f"{torchrun.ROOT}/train.py", "run.name=x", "schedule.total_steps=5"]
    several = torchrun_words("--nodes=2", "--rendezvous=127.0.0.1:4000")
    assert {"--nnodes=2", "--rdzv-endpoint=127.0.0.1:4000", "--local-addr=127.0.0.1"} <= {*several}
    assert not any("is_host" in word for word in several)  # both may be on this machine


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes=2"], "--rendezvous is None and --nodes is 2; give one of the machines"),
        (["--nodes=2", "--rendezvous=gpu-01"], "--rendezvous is gpu-01 and --nodes is 2"),
        (["--nodes=2", "--rendezvous=no.invalid:4"], "names no.invalid, which this machine cannot"),
        (["--", "optim.learning_rate=-1"], "optim.learning_rate is -1.0; set it above 0."),
    ],
)
def test_what_torchrun_could_not_start_is_refused(words: list[str], said: str) -> None:
    done = run([sys.executable, "-m", "launch.torchrun", "--processes=4", "--dry-run", *words])
    assert (done.returncode, done.stderr.count("\n"), said in done.stderr) == (1, 1, True)


@pytest.mark.parametrize(
    ("new_starts", "said", "asked", "code"),
    [
        ([{"ended": {"how": "finished"}}], None, False, 0),
        ([{}, {"ended": {"how": "finished"}}], None, False, 0),  # after a restart
        ([{"ended": {"how": "finished"}}], "process 1 ended with 1", True, 0),
        ([{"ended": {"how": "stopped"}}], "process 1 ended with 75", False, 75),
        ([], None, False, 0),  # finished before
        ([], "process 1 was killed by SIGTERM", True, 75),  # before it could listen
        ([{}], "process 1 was killed by SIGKILL", False, 1),
        ([], "process 0 ended with 1", False, 1),
    ],
)
def test_the_exit_code_is_what_the_run_notes(
    new_starts: list[dict], said: str | None, asked: bool, code: int
) -> None:
    assert exit_code(new_starts, said=said, asked=asked) == code


def test_launchers_start_without_torch() -> None:
    names = [name for name in our_modules() if name.startswith("launch.")]
    assert len(names) > 3
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_place_says_which_codes_there_are() -> None:
    """launch/ may not import nmm.stop, which imports torch."""
    tree = ast.parse(Path("nmm/stop.py").read_text())
    assigned = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert (assigned["EXIT_CODE"], assigned["FILE"]) == (torchrun.EXIT_CODES["stopped"], "STOP")
