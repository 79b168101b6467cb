"""Checks shared by the config groups; every message holds the key, the value and the remedy.

Not-a-number and infinity fail every check, because the conditions are written as what must hold.
"""

from math import inf

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


def _dotted(key: str) -> str:
    return key.replace("__", ".")
