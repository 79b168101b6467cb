"""The one exception for what a user can cause; entry points print it without a traceback."""

from nmm.credentials import masked


class UserError(ValueError):
    """A wrong value or a missing thing; the message names the key, the value and the remedy.

    Whatever it is about, it tells no password.
    """

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class DivergenceError(UserError):
    """A loss or gradient is no number, so that going on with the same settings makes no sense."""
