"""What a conversion could not use: counted by reason, with the first places of each."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from nmm.errors import UserError

What = Literal["document", "image"]
Found = dict[str, tuple[int, list[str]]]
IN_A_ROW = 100
EXAMPLES = 3


class Unusable(Exception):  # noqa: N818 - a verdict on a piece of data, counted and not fatal
    """A text or an image that cannot be used; the message is the reason.

    `expected` is a loss that says nothing against the command, such as an image on the web.
    """

    def __init__(self, reason: str, *, expected: bool = False) -> None:
        super().__init__(reason)
        self.expected = expected


class LeftOut:
    """Counts of a task, by reason; `found` is what the report needs, and can be stored."""

    def __init__(self) -> None:
        self.found: Found = {}
        self._in_a_row: Counter[What] = Counter()

    def add(self, reason: Unusable | str, *, where: str, what: What = "document") -> None:
        """Count a loss; raises UserError at the hundredth in a row since the last `used`."""
        text = str(reason)
        self.note(f"{text}: left out of its document" if what == "image" else text, where=where)
        if isinstance(reason, Unusable) and reason.expected:
            return
        self._in_a_row[what] += 1
        if self._in_a_row[what] == IN_A_ROW:
            raise UserError(
                f"--input has {IN_A_ROW} {what}s in a row that cannot be used, the last at "
                f"{where}: {text}; check the form, the fields and the --image-root of the command."
            )

    def note(self, reason: str, *, where: str) -> None:
        """Count something worth knowing that is not a loss of a document."""
        count, places = self.found.get(reason, (0, []))
        self.found[reason] = (count + 1, [*places, where][:EXAMPLES])

    def used(self, what: What = "document") -> None:
        self._in_a_row[what] = 0


def join(parts: Iterable[Found]) -> Found:
    """All counts together; the first places are those of the first parts."""
    joined: Found = {}
    for part in parts:
        for reason, (count, places) in part.items():
            before, first = joined.get(reason, (0, []))
            joined[reason] = (before + count, [*first, *places][:EXAMPLES])
    return joined


def report(found: Found) -> str:
    """A line per reason, most frequent first, and its places; empty if there is nothing to say."""
    lines = []
    for reason, (count, places) in sorted(found.items(), key=lambda item: -item[1][0]):
        lines += [f"{count:8}  {reason}\n", *(f"{'':14}{_printable(place)}\n" for place in places)]
    return "".join(lines)


def _printable(place: str) -> str:
    """Names are escaped where they hold what would break a line or a terminal."""
    return repr(place)[1:-1]
