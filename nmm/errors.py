"""The one exception for what a user can cause; entry points print it without a traceback."""


class UserError(ValueError):
    """A wrong value or a missing thing; the message names the key, the value and the remedy."""


class DivergenceError(UserError):
    """A loss or gradient is no number, so that going on with the same settings makes no sense."""
