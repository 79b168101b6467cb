"""The shape of the house: who may import whom, where each library lives, habits of files."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ("runs", "wandb", "outputs")  # and data/corpora

# The longest matching prefix gives a module its rank; a new module of nmm/ needs a line of its own.
# Imports point to the same rank or down; parts of rank 2 are islands, none imports another.
RANKS = {
    "nmm": 0,
    "nmm.activations": 0,
    "nmm.config": 0,
    "nmm.credentials": 0,
    "nmm.errors": 0,
    "nmm.schedule": 0,
    "nmm.flops": 0,
    "nmm.batch": 0,
    "nmm.hub": 0,
    "nmm.tally": 0,
    "nmm.heartbeat": 1,
    "nmm.routing": 0,
    "nmm.log": 1,
    "nmm.plot": 1,
    "nmm.rundir": 1,
    "nmm.signals": 1,
    "nmm.trace": 1,
    "nmm.codes": 2,
    "nmm.model": 2,
    "nmm.scaling": 2,
    "data": 2,
    "nmm.copies": 3,
    "nmm.elastic": 3,
    "nmm.exchange": 3,
    "nmm.expert_parallel": 3,
    "nmm.fault": 3,
    "nmm.inside_deepspeed": 3,
    "nmm.needs": 3,
    "nmm.parallel": 3,
    "nmm.pieces": 3,
    "nmm.shares": 3,
    "nmm.stop": 3,
    "nmm.sums": 3,
    "nmm.take_back": 3,
    "nmm.engine": 4,
    "nmm.begin": 5,
    "nmm.checkpoint": 5,
    "nmm.evaluate": 5,
    "nmm.export": 5,
    "nmm.held_out": 5,
    "nmm.generate": 5,
    "nmm.identity": 5,
    "nmm.image_gap": 5,
    "nmm.intact": 5,
    "nmm.parent": 5,
    "nmm.quarantine": 5,
    "nmm.report": 5,
    "nmm.rows": 5,
    "nmm.saving": 5,
    "nmm.skipped": 5,
    "nmm.specialisation": 5,
    "nmm.trained": 5,
    "nmm.upcycle": 5,
    "nmm.uploads": 5,
    "data.prepare": 6,
    "launch": 6,
    "bench": 6,
    "train": 6,
}
ISLAND_RANK = 2

# Only these modules, and those below them, import the library. Entry points may import Hydra too.
HOMES = {
    "deepspeed": ("nmm.inside_deepspeed", "bench.moe"),
    "liger_kernel": ("nmm.model.loss",),
    "webdataset": ("data",),
    "fsspec": ("data.remote",),
    "aiohttp": ("data.remote",),
    "pyarrow": ("data.prepare.convert",),
    "selectolax": ("data.prepare.convert",),
    "markdown_it": ("data.prepare.convert",),
    "mdit_py_plugins": ("data.prepare.convert",),
    "wandb": ("nmm.log",),
    "matplotlib": ("nmm.plot",),
    "transformers": ("nmm.hub", "nmm.codes", "bench.moe"),
    "scipy": ("nmm.scaling",),
    "hydra": ("nmm.config",),
    "omegaconf": ("nmm.config",),
}
WITHOUT_TORCH = ("nmm.config", "nmm.errors", "nmm.schedule", "nmm.flops", "nmm.scaling")

Modules = dict[str, ast.Module]


def is_ours(top: Path) -> bool:
    """Is this entry of the root written by hand? Environments, caches and outputs are not."""
    hidden = top.name.startswith(".") and top.name != ".ci"
    return not hidden and top.name not in OUTPUTS and not (top / "pyvenv.cfg").exists()


def files(*patterns: str) -> list[Path]:
    """Our files whose names match one of the patterns, sorted."""
    below = (path for top in ROOT.iterdir() if is_ours(top) for path in (top, *top.rglob("*")))
    return sorted(
        path
        for path in below
        if path.is_file()
        and "corpora" not in path.parts
        and not any(part.startswith(".venv") for part in path.parts)
        and any(map(path.match, patterns))
    )


def our_modules() -> Modules:
    """Every module outside tests/ by its dotted name; a package is named like its folder."""
    modules = {}
    for path in files("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] != "tests":
            name = ".".join(parts).removesuffix(".__init__")
            modules[name] = ast.parse(path.read_text(encoding="utf-8"))
    return modules


def part_of(module: str) -> str | None:
    """The key of RANKS that a module belongs to: its longest prefix there."""
    prefixes = [part for part in RANKS if f"{module}.".startswith(f"{part}.")]
    part = max(prefixes, key=len, default=None)
    return None if part == "nmm" != module else part


def imports(module: str, tree: ast.Module) -> Iterator[str]:
    """Every name that a module imports, at whatever depth; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno} imports relatively; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges(modules: Modules) -> dict[str, set[str]]:
    """For each module those of ours that it imports."""
    graph = {}
    for module, tree in modules.items():
        names = set(imports(module, tree))
        parents = {name.rpartition(".")[0] for name in names - modules.keys()}
        graph[module] = (names | parents) & modules.keys() - {module}
    return graph


def is_entry_point(module: str, tree: ast.Module) -> bool:
    """Can `python -m` run it? That is, does it test its own `__name__`, or is it a `__main__`?"""
    guards = (node for node in tree.body if isinstance(node, ast.If))
    return module.endswith("__main__") or any(
        "__name__" in ast.unparse(node.test) for node in guards
    )


def rank_faults(modules: Modules) -> list[str]:
    parts = {module: part_of(module) for module in modules}
    faults = [
        f"{module} has no rank; add it to RANKS in tests/test_structure.py"
        for module, part in parts.items()
        if part is None
    ]
    for module, targets in edges(modules).items():
        for target in sorted(targets):
            here, there = parts[module], parts[target]
            if here is None or there is None:
                continue
            if RANKS[there] > RANKS[here]:
                faults.append(f"{module} ({RANKS[here]}) imports {target} ({RANKS[there]})")
            elif RANKS[here] == RANKS[there] == ISLAND_RANK and here != there:
                faults.append(f"{module} imports {target}; {here} and {there} are islands")
    return faults


def cycle_faults(modules: Modules) -> list[str]:
    try:
        list(TopologicalSorter(edges(modules)).static_order())
    except CycleError as error:
        return [f"import cycle: {' <- '.join(error.args[1])}"]
    return []


def home_faults(modules: Modules) -> list[str]:
    """Benchmarks compare with other libraries and may import what they like."""
    faults = []
    for module, tree in modules.items():
        for name in imports(module, tree):
            library = name.partition(".")[0]
            homes = HOMES.get(library, ())
            at_home = not homes or f"{module}.".startswith((*(f"{h}." for h in homes), "bench."))
            composes = library in ("hydra", "omegaconf") and is_entry_point(module, tree)
            if not at_home and not composes:
                faults.append(f"{module} imports {library}, whose home is {' or '.join(homes)}")
    return faults


def torch_faults(modules: Modules) -> list[str]:
    return [
        f"{module} imports torch; it must start on a machine without it"
        for module, tree in modules.items()
        if f"{module}.".startswith(tuple(f"{part}." for part in (*WITHOUT_TORCH, "launch")))
        and any(name.partition(".")[0] == "torch" for name in imports(module, tree))
    ]


def asserts(function: ast.AST) -> bool:
    """Can it fail? It holds an assertion that is no constant, pytest.raises, or calls a check_*."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "pytest.raises" or called.startswith(("check_", "torch.testing.assert_")):
                return True
    return False


def assertion_faults(trees: Modules) -> list[str]:
    return [
        f"{name}: {node.name} asserts nothing"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith(("test_", "check_"))
        and not asserts(node)
    ]


def test_imports_point_down() -> None:
    modules = our_modules()
    assert rank_faults(modules) == []
    assert set(map(part_of, modules)) == set(RANKS)  # no rank without a module


def test_no_import_cycle() -> None:
    assert cycle_faults(our_modules()) == []


def test_libraries_stay_at_home() -> None:
    assert home_faults(our_modules()) == []


def test_planning_needs_no_torch() -> None:
    modules = our_modules()
    assert torch_faults(modules) == []
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_test_can_fail() -> None:
    tests = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in files("test_*.py")}
    assert assertion_faults(tests) == []


def test_files_name_no_machine_and_leave_nothing_open() -> None:
    pattern = re.compile(r"\bTO[D]O\b|\bFIX[M]E\b|(?<![\w.])/(wor[k]|roo[t])/")
    kinds = ["*.py", "*.sh", "*.yaml", "*.toml", "*.md", "*.in", "*.lock", "run", "*file"]
    found = {str(path): pattern.findall(path.read_text(encoding="utf-8")) for path in files(*kinds)}
    assert {path: hits for path, hits in found.items() if hits} == {}


def test_the_lock_pins_every_requirement_but_torch() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    lock = [line for line in lines if not line.lstrip().startswith("#")]
    pinned = {line.partition("==")[0] for line in lock}
    wanted = re.findall(r"^[\w.-]+", (ROOT / "requirements.in").read_text(), flags=re.MULTILINE)
    assert [line for line in lock if not re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line)] == []
    assert set(wanted) - pinned == set()
    assert [name for name in pinned if name.startswith(("torch", "nvidia", "triton"))] == []


@pytest.mark.parametrize(
    ("faults", "sources", "expected"),
    [
        (rank_faults, {"nmm.novel": ""}, "nmm.novel has no rank"),
        (rank_faults, {"nmm.log": "import nmm.engine", "nmm.engine": ""}, "(1) imports nmm.engine"),
        (
            rank_faults,
            {"nmm.flops": "def f(): from nmm import log", "nmm.log": ""},
            "imports nmm.log (1)",
        ),
        (rank_faults, {"data.a": "from nmm.model import M", "nmm.model": ""}, "are islands"),
        (
            rank_faults,
            {"data.a": "import data.prepare.b", "data.prepare.b": ""},
            "data.prepare.b (6)",
        ),
        (cycle_faults, {"data.a": "import data.b", "data.b": "from data import a"}, "import cycle"),
        (home_faults, {"nmm.plot": "import wandb"}, "imports wandb, whose home is nmm.log"),
        (home_faults, {"nmm.rundir": "import hydra"}, "imports hydra, whose home is nmm.config"),
        (torch_faults, {"nmm.config.a": "import torch.nn as nn"}, "nmm.config.a imports torch"),
        (assertion_faults, {"x": "def test_y() -> None: assert True"}, "test_y asserts nothing"),
        (assertion_faults, {"x": "def check_y() -> None: print(1)"}, "check_y asserts nothing"),
    ],
)
def test_the_rules_catch(
    faults: Callable[[Modules], list[str]], sources: dict[str, str], expected: str
) -> None:
    (fault,) = faults({name: ast.parse(source) for name, source in sources.items()})
    assert expected in fault
