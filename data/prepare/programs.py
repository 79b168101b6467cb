"""Code that is on every machine with our pinned packages: their functions, without comments."""

import ast
from collections.abc import Iterator
from pathlib import Path

from data.prepare import prose

LEAST_BYTES = 200


def texts(*, seed: int) -> Iterator[str]:
    """Every function once; the order depends on the seed and the packages alone."""
    return prose.from_files(_functions, seed=seed)


def _functions(path: Path) -> Iterator[str]:
    """The functions and methods of a file that are long enough, without documentation strings.

    Those are the text of the corpus, and would be in two modalities.
    """
    tree = prose.parsed(path)
    if tree is None:
        return
    for node in ast.walk(tree):
        if isinstance(node, prose.DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
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
