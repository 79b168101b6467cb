"""HTML -> plain text and images in reading order.

Kept is what a reader sees, with marks of structure: "# " before headings, "- " or "1. " before the
items of lists, " | " between the cells of tables, ``` around code, $ around the TeX of formulas.
Emphasis, the targets of links, scripts, styles and navigation are dropped.
"""

import re
from collections.abc import Callable, Mapping

from selectolax.lexbor import LexborHTMLParser, LexborNode

from data.prepare.convert.left_out import Unusable
from data.prepare.convert.plain import Parts, Plain

ReadImage = Callable[[str], bytes | None]
Attributes = Mapping[str, str | None]

SKIPPED = {
    "head", "style", "nav", "template", "noscript", "iframe", "object", "embed", "canvas",
    "audio", "video", "button", "input", "select", "textarea", "dialog",
}  # fmt: skip
HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
# Elements that stand apart by a blank line, and those that begin a line.
APART = {
    *HEADINGS, "p", "ul", "ol", "dl", "table", "pre", "blockquote", "figure", "hr", "section",
    "article", "main", "header", "footer", "aside", "details", "fieldset", "form", "center",
}  # fmt: skip
LINES = {
    "div", "li", "dt", "dd", "tr", "br", "figcaption", "summary", "caption", "legend", "address",
}  # fmt: skip
# A table with such elements in a cell is a layout, and its cells stand apart.
IN_LAYOUTS = ("table", "p", "div", "ul", "ol", "pre", "blockquote", "h1", "h2", "h3", "h4")
LAYOUT = ", ".join(f"td {tag}" for tag in IN_LAYOUTS)
DRAWING = "data:image/svg+xml,<svg>"  # the link of a drawing that is part of the page
TAGS = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")
DEEPEST = 20_000
# Elements that are never open inside themselves, whether or not their end is written.
ENDED_BY_OTHERS = {
    "area", "base", "br", "col", "dd", "dt", "embed", "hr", "img", "input", "li", "link", "meta",
    "option", "p", "param", "source", "tbody", "td", "tfoot", "th", "thead", "tr", "track", "wbr",
}  # fmt: skip
TEX_SCRIPT = "math/tex"
TEX_IN_MATHML = 'annotation[encoding="application/x-tex"]'


def read(html: str, *, image: ReadImage) -> Parts:
    """The parts of a page; `image` gets the link of every <img> ("": none) and may return None.

    Raises Unusable for elements nested so deeply that the parser would take hours.
    """
    if _is_deep(html):
        raise Unusable(f"page with more than {DEEPEST:,} elements inside each other")
    page = _Page(image)
    root = LexborHTMLParser(html).root
    stack = [(root, True)] if root is not None else []
    while stack:  # and no recursion, because pages are nested as deep as they like
        node, entering = stack.pop()
        if not entering:
            page.leave(node.tag or "")
        elif page.enter(node):
            stack.append((node, False))
            children = list(node.iter(include_text=True))
            stack.extend((child, True) for child in reversed(children))
    return page.plain.finished()


class _Page:
    """The elements of a page, entered and left in the order of the text."""

    def __init__(self, image: ReadImage) -> None:
        self.plain, self._image = Plain(), image
        self._lists: list[int | None] = []  # number of the next item; None: no numbers
        self._tables: list[int | None] = []  # cells of the row so far; None: a layout
        self._code: list[str] | None = None

    def enter(self, node: LexborNode) -> bool:
        """Begin an element, or take a text; are its children to be entered?"""
        tag = node.tag or ""
        if tag == "-text":
            self._text(node.text_content or "")
            return False
        if tag in SKIPPED or tag.startswith(("-", "!")) or _is_hidden(node.attributes):
            return False
        if tag in ("script", "math"):
            return self._formula(node)
        if tag in ("img", "svg"):
            self._picture(DRAWING if tag == "svg" else _link(node.attributes))
            return False
        self._end_line(tag)
        self._begin(tag, node)
        return True

    def leave(self, tag: str) -> None:
        match tag:
            case "pre":
                self.plain.verbatim("".join(self._code or []))
                self._code = None
            case "code" if self._code is None:
                self.plain.attach("`")
            case "ul" | "ol":
                self._lists.pop()
            case "li" | "h1" | "h2" | "h3" | "h4" | "h5" | "h6":
                self.plain.close_item()
            case "table":
                self._tables.pop()
        if tag != "br":
            self._end_line(tag)

    def _begin(self, tag: str, node: LexborNode) -> None:
        match tag:
            case "pre":
                self._code = []
            case "code" if self._code is None:
                self.plain.write("`")
            case "ul" | "ol":
                self._lists.append(_first_number(node.attributes) if tag == "ol" else None)
            case "li":
                self.plain.open_item(self._marker())
            case "table":
                self._tables.append(0 if node.css_first(LAYOUT) is None else None)
            case "tr" if self._in_values:
                self._tables[-1] = 0
            case "td" | "th":
                self._begin_cell()
            case _ if tag in HEADINGS:
                self.plain.open_item(HEADINGS[tag])

    @property
    def _in_values(self) -> bool:
        """Inside of a table that is no layout?"""
        return bool(self._tables) and self._tables[-1] is not None

    def _end_line(self, tag: str) -> None:
        if tag not in APART and tag not in LINES:
            return
        if self._code is not None:
            self._code.append("\n" if tag == "br" else "")
        elif self._in_values and tag not in ("table", "caption", "tr"):
            self.plain.space()
        else:
            is_list_in_list = bool(self._lists) and tag in ("ul", "ol")
            self.plain.end_line(apart=tag in APART and not is_list_in_list)

    def _begin_cell(self) -> None:
        if not self._in_values:
            self.plain.end_line(apart=True)
            return
        before = self._tables[-1] or 0
        if before:
            self.plain.end_cell()
        self._tables[-1] = before + 1

    def _marker(self) -> str:
        """What the next item of the innermost list begins with."""
        number = self._lists[-1] if self._lists else None
        if number is None:
            return "- "
        self._lists[-1] = number + 1
        return f"{number}. "

    def _text(self, text: str) -> None:
        if self._code is not None:
            self._code.append(text)
        else:
            self.plain.words(text)

    def _picture(self, link: str) -> None:
        found = self._image(link)
        if found is not None:
            self.plain.image(found)

    def _formula(self, node: LexborNode) -> bool:
        """The TeX of a formula; a script that is none is dropped, MathML without TeX is text."""
        attributes = node.attributes
        kind = attributes.get("type") or ""
        if node.tag == "script" and not kind.startswith(TEX_SCRIPT):
            return False
        source = node if node.tag == "script" else node.css_first(TEX_IN_MATHML)
        tex = source.text(deep=True) if source is not None else attributes.get("alttext")
        if not tex:
            return True
        display = attributes.get("display") == "block" or "mode=display" in kind
        mark = "$$" if display else "$"
        self.plain.write(f"{mark}{tex.strip()}{mark}")
        return False


def _first_number(attributes: Attributes) -> int:
    start = attributes.get("start") or ""
    return int(start) if re.fullmatch(r"[0-9]{1,9}", start) else 1


def _is_deep(html: str) -> bool:
    """Are there elements inside each other beyond what the parser, which is quadratic, can take?"""
    depth = 0
    if html.count("<") <= DEEPEST:
        return False
    for tag in TAGS.finditer(html):
        if tag[2].lower() not in ENDED_BY_OTHERS:
            depth += -1 if tag[1] else 1
            if depth > DEEPEST:
                return True
    return False


def _link(attributes: Attributes) -> str:
    """Some pages load the file that data-src names later, and have a placeholder in src."""
    return attributes.get("data-src") or attributes.get("src") or ""


def _is_hidden(attributes: Attributes) -> bool:
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or attributes.get("role") == "navigation"
    )
