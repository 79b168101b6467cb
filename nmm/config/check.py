"""Checks shared by the config groups; every message holds the key, the value and the remedy.

Not-a-number and infinity fail every check, because the conditions are written as what must hold.
"""

from collections.abc import Iterator
from math import inf

from nmm.credentials import holds_credentials
from nmm.errors import UserError


def at_least(minimum: float, **values: float | None) -> None:
    """Refuse any value below `minimum`; None passes. Keys are written as `group__field`."""
    for key, value in values.items():
        if value is not None and not minimum <= value < inf:
            raise UserError(f"{_dotted(key)} is {value}; set it to {minimum} or more.")


def positive(**values: float | None) -> None:
    """Refuse zero and negative values; None passes. Keys are written as `group__field`."""
    for key, value in values.items():
        if value is not None and not 0 < value < inf:
            raise UserError(f"{_dotted(key)} is {value}; set it above 0.")


def fraction(**values: float | None) -> None:
    """Refuse values outside [0, 1]; None passes. Keys are written as `group__field`."""
    for key, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{_dotted(key)} is {value}; it is a fraction, set it between 0 and 1.")


def texts_of(node: object, *, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in a tree of plain values."""
    if isinstance(node, str):
        yield key, node
    named = enumerate(node) if isinstance(node, list) else ()
    for name, value in node.items() if isinstance(node, dict) else named:
        yield from texts_of(value, key=f"{key}.{name}" if key else f"{name}")


def no_credentials(node: object, *, key: str = "") -> None:
    """Refuse a URL with a password or a token in a value, or anywhere in a tree of values."""
    for name, text in texts_of(node, key=key):
        if holds_credentials(text):
            raise UserError(
                f"{name} is {text}, and what is hidden here would be written into files; take it "
                f"out, and give it to the process as docs/security.md says."
            )


def _dotted(key: str) -> str:
    return key.replace("__", ".")
