"""Plain text with images between, put together word by word."""

import re

Parts = list[str | bytes]
SPACES = re.compile(r"[ \t\n\f]+")
FENCE = "```"


class Plain:
    """Words, line ends and images in reading order, with white space as a page shows it.

    Breaks and spaces are due until the next word, so that none stands at an end, or twice.
    """

    def __init__(self) -> None:
        self._parts: Parts = []
        self._text: list[str] = []
        self._gap, self._space = 0, False  # line ends that are due; a space that is due
        self._indents = [""]
        self._begin: str | None = None  # what the next word's line begins with, if not the indent

    def words(self, text: str) -> None:
        """Text whose white space means one space at most."""
        text = SPACES.sub(" ", text)
        self._space |= text.startswith(" ")
        if word := text.strip(" "):
            self.write(word)
            self._space = text.endswith(" ")

    def write(self, text: str) -> None:
        """Text as it stands, behind what is due."""
        if self._gap and self._text:
            self._text.append("\n" * self._gap)
            self._begin = self._indents[-1] if self._begin is None else self._begin
        elif self._space and self._text:
            self._text.append(" ")
        self._text += [self._begin or "", text.replace("\n", f"\n{self._indents[-1]}")]
        self._gap, self._space, self._begin = 0, False, None

    def attach(self, text: str) -> None:
        """Text right behind the last word, before a space that is due."""
        self._text.append(text)

    def space(self) -> None:
        self._space = True

    def end_line(self, *, apart: bool) -> None:
        """The next word begins a line; `apart`: behind a blank one."""
        self._gap, self._space = max(self._gap, 2 if apart else 1), False

    def end_cell(self) -> None:
        """The next word is in the next cell of the same row of a table."""
        if self._gap:
            self.write("|")
        else:
            self.attach(" |")
        self._space = True

    def verbatim(self, code: str) -> None:
        """Lines with all their white space, between fences."""
        code = code.strip("\n")
        if not code.strip():
            return
        fence = FENCE
        while fence in code:
            fence += FENCE[0]
        self.end_line(apart=True)
        self.write(f"{fence}\n{code}\n{fence}")
        self.end_line(apart=True)

    def open_item(self, marker: str) -> None:
        """The next word is behind a marker; the lines that follow are as far to the right."""
        self._begin = self._indents[-1] + marker
        self._indents.append(self._indents[-1] + " " * len(marker))

    def close_item(self) -> None:
        self._indents.pop()
        self._begin = None

    def image(self, image: bytes) -> None:
        self._end_text()
        self._parts.append(image)

    def finished(self) -> Parts:
        self._end_text()
        return self._parts

    def _end_text(self) -> None:
        text = "".join(self._text).strip()
        if text:
            self._parts.append(text)
        self._text, self._gap, self._space = [], 0, False
