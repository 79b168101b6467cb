"""Markdown -> HTML: CommonMark with tables, formulas and HTML; front matter is dropped."""

import re
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_inline import StateInline
from mdit_py_plugins.dollarmath import dollarmath_plugin

FRONT_MATTER = re.compile(r"---[ \t]*\n(?:.*\n)*?(?:---|\.\.\.)[ \t]*(?:\n|\Z)")
# \( \) and \[ \], or with two backslashes as in sites of Jekyll; not longer than any formula is.
BRACKETS = re.compile(r"(\\{1,2})(?:\((.{1,4000}?)\1\)|\[(.{1,4000}?)\1\])", re.DOTALL)
LIKE_TEX = re.compile(r"[\\^_=]")
INLINE, DISPLAY, BLOCK = "math_inline", "math_inline_double", "math_block"


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
    match = BRACKETS.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    tex = match[2] or match[3]
    if len(match[1]) == 1 and not LIKE_TEX.search(tex):
        return False
    if not silent:
        token = state.push(INLINE if match[2] else DISPLAY, "math", 0)
        token.content = tex
    state.pos = match.end()
    return True


def _formula(renderer: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    """The element that HTML has for formulas; the signature is that of the library."""
    token = tokens[index]
    display = "" if token.type == INLINE else ' display="block"'
    element = f'<math alttext="{escapeHtml(token.content)}"{display}></math>'
    return f"<p>{element}</p>\n" if token.type == BLOCK else element
