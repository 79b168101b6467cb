"""Markdown -> HTML: CommonMark with tables, formulas and HTML; front matter is dropped."""

import re
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from mdit_py_plugins.dollarmath import dollarmath_plugin

FRONT_MATTER = re.compile(r"---[ \t]*\n(?:.*\n)*?(?:---|\.\.\.)[ \t]*(?:\n|\Z)")
LONGEST = 4000  # characters of a formula
LIKE_TEX = re.compile(r"[\\^_=]")
INLINE, DISPLAY, BLOCK = "math_inline", "math_inline_double", "math_block"
BRACKETS = (  # those with two backslashes are of sites made by Jekyll
    (r"\\(", r"\\)", INLINE),
    (r"\\[", r"\\]", DISPLAY),
    (r"\(", r"\)", INLINE),
    (r"\[", r"\]", DISPLAY),
)


def to_html(text: str) -> str:
    if match := FRONT_MATTER.match(text):
        text = text[match.end() :]
    return _parser().render(text)


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    parser.use(dollarmath_plugin, double_inline=True, allow_labels=False, allow_space=False)
    parser.inline.ruler.before("escape", "math_brackets", _brackets)
    parser.validateLink = lambda url: True  # else an image with an odd data URI stays as its source
    for rule in (INLINE, DISPLAY, BLOCK):
        parser.add_render_rule(rule, _formula)
    return parser


def _brackets(state: StateInline, silent: bool) -> bool:
    """A formula in brackets. Single backslashes also mean just a bracket, so it must look like one.

    The signature is that of a rule of the library.
    """
    for opening, closing, kind in BRACKETS:
        if state.src.startswith(opening, state.pos):
            start = state.pos + len(opening)
            end = state.src.find(closing, start, min(start + LONGEST, state.posMax))
            tex = state.src[start:end]
            if end < 0 or (len(opening) == 2 and not LIKE_TEX.search(tex)):
                return False
            if not silent:
                state.push(kind, "math", 0).content = tex
            state.pos = end + len(closing)
            return True
    return False


def _formula(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """The element that HTML has for formulas; the signature is that of the library."""
    token = tokens[index]
    display = "" if token.type == INLINE else ' display="block"'
    element = f'<math alttext="{escapeHtml(token.content)}"{display}></math>'
    return f"<p>{element}</p>\n" if token.type == BLOCK else element
