"""Code that is on every machine with our pinned packages: their functions, without comments."""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from data.prepare import prose

LEAST_BYTES = 200
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def texts(*, seed: int) -> Iterator[bytes]:
    """Every function once, in UTF-8; the order depends on the seed and the packages alone."""
    seen: set[bytes] = set()
    for text in prose.from_files(_functions, seed=seed):
        encoded = text.encode()
        digest = hashlib.sha256(encoded).digest()
        if digest not in seen:
            seen.add(digest)
            yield encoded


def held_out(code: bytes) -> bool:
    """Does a function belong to the held-out split? Decided by its content alone."""
    return hashlib.sha256(code).digest()[0] % prose.HELD_OUT_ONE_IN == 0


def _functions(path: Path) -> Iterator[str]:
    """The functions and methods of a file that are long enough, without documentation strings.

    Those are the text of the corpus, and would be in two modalities.
    """
    tree = prose.parsed(path)
    if tree is None:
        return
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    for node in _outermost(tree):
        text = ast.unparse(node)
        if len(text) >= LEAST_BYTES and prose.encodable(text):
            yield text


def _outermost(node: ast.AST) -> Iterator[ast.AST]:
    """Functions that are in no other one, so that no text is in two of them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost(child)
