"""Real prose that is on every machine with our pinned packages: their documentation strings."""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random

# Read in turn, always from the one that gave least so far. The standard library comes last, where
# these run dry: its text changes with the Python version and theirs with the lock file only.
PACKAGES = (
    "torch",
    "numpy",
    "matplotlib",
    "sympy",
    "networkx",
    "deepspeed",
    "wandb",
    "pydantic",
    "PIL",
    "fsspec",
    "jinja2",
    "mpmath",
    "webdataset",
)
SKIPPED_FOLDERS = {
    "tests",
    "test",
    "idle_test",
    "testing",
    "vendor",
    "_vendor",
    "vendored",
    "third_party",
}
INSTALLED_FOLDERS = {"site-packages", "dist-packages"}
MINIMUM_CHARACTERS = 200
HELD_OUT_ONE_IN = 8
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def texts(*, seed: int) -> Iterator[str]:
    """Every documentation string once; the order depends on the seed and the packages alone."""
    return from_files(_documentation_of, seed=seed)


def from_files(read: Callable[[Path], Iterator[str]], *, seed: int) -> Iterator[str]:
    """What `read` finds in the Python files of the packages, evenly, then of the library; once."""
    seen: set[bytes] = set()
    packages = [root for name in PACKAGES if (root := _package_folder(name))]
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    for roots in (packages, [standard_library]):
        rngs = [Random(f"{seed} {root.name}") for root in roots]
        for text in _evenly(
            [_of_folder(root, read, rng=rng) for root, rng in zip(roots, rngs, strict=True)]
        ):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield text


def held_out(text: str) -> bool:
    """Does a text belong to the held-out split? Decided by its content alone."""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def _package_folder(name: str) -> Path | None:
    """A package's folder, without importing it."""
    spec = find_spec(name)
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else None


def _evenly(streams: list[Iterator[str]]) -> Iterator[str]:
    """Merge the streams so that each gives as many characters as the others, until it ends."""
    given = dict.fromkeys(range(len(streams)), 0)
    while given:
        index = min(given, key=lambda i: given[i])
        text = next(streams[index], None)
        if text is None:
            del given[index]
        else:
            given[index] += len(text)
            yield text


def _of_folder(root: Path, read: Callable[[Path], Iterator[str]], *, rng: Random) -> Iterator[str]:
    """What is found under a folder; files in random order, each read from its top."""
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    skipped = SKIPPED_FOLDERS | INSTALLED_FOLDERS
    kept = sorted((path for path in files if not skipped & set(path.parts)), key=Path.as_posix)
    rng.shuffle(kept)
    for path in kept:
        yield from read(root / path)


def parsed(path: Path) -> ast.Module | None:
    """A Python file; None where it does not parse: for another version, or not text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in files that are not ours
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return None


def _documentation_of(path: Path) -> Iterator[str]:
    """The documentation strings of one file that are long enough; none where it does not parse."""
    tree = parsed(path)
    if tree is None:
        return
    for node in ast.walk(tree):
        found = ast.get_docstring(node, clean=False) if isinstance(node, DOCUMENTED) else None
        text = inspect.cleandoc(found) if found else ""
        if len(text) >= MINIMUM_CHARACTERS and encodable(text):
            yield text


def encodable(text: str) -> bool:
    """Lone surrogates can be written in Python and not in a file."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
