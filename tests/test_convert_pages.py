"""Markdown and HTML: what a reader sees, in reading order, as plain text and images."""

import base64
from pathlib import Path

import pytest

from data.prepare.convert import hypertext, markdown
from data.prepare.convert.left_out import Unusable
from nmm.config import Kind
from tests.converting import check_reported, picture, read, run

WHOLE = ("--held-out-fraction", 0)


def plain(html: str) -> str:
    """The text of a page; [LINK] stands for an image."""
    parts = hypertext.read(html, image=lambda link: f"[{link}]".encode())
    return "".join(part if isinstance(part, str) else part.decode() for part in parts)


def plain_markdown(text: str) -> str:
    return plain(markdown.to_html(text))


MARKDOWN = """---
layout: post
title: Cats
---

Cats
====

Some *emphasis*, a [link](http://x.org), `code` and 1 < 2.
A line that goes
on.

1. first
2. second
   - inner ![](a.png) text

   ```python
   if a:
       b = "``"
   ```

| a | b |
|---|---|
| 1 | ![](t.png) |
| 2 | `x` |

Inline $a_1 * b_2 * c$ and \\\\(p_1\\\\) and \\(x_2\\), not \\(so\\), \\[1\\] or $5 and $6.

$$
\\frac{a}{b} \\\\
c_1
$$

<div class="fig"><img src="/assets/b.png"><p>A <b>figure</b>.</p></div>
<script>alert("no")</script>

---
The end.
"""
OF_MARKDOWN = """# Cats

Some emphasis, a link, `code` and 1 < 2. A line that goes on.

1. first

2. second

   - inner[a.png]text

   ```
   if a:
       b = "``"
   ```

a | b
1 |[t.png]2 | `x`

Inline $a_1 * b_2 * c$ and $p_1$ and $x_2$, not (so), [1] or $5 and $6.

$$\\frac{a}{b} \\\\
c_1$$[/assets/b.png]A figure.

The end."""


def test_markdown_is_plain_text_with_its_images() -> None:
    assert plain_markdown(MARKDOWN) == OF_MARKDOWN


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<title>T</title><style>p{}</style><nav>menu</nav><p>a</p>", "a"),
        (
            "<p>a<div role=navigation>menu</div><div hidden>x</div><p aria-hidden=true>y<p>b",
            "a\n\nb",
        ),
        ("<h2> Two <em>words</em></h2>text", "## Two words\n\ntext"),
        ("a<br>b<br/>\n  c", "a\nb\nc"),
        ("<b>a</b><i>b</i> <u> c </u>d&nbsp;&amp;&lt;e", "ab c d\xa0&<e"),
        (
            "<ul><li>a<li>b<ol start=3><li>c<li></li><li>d</ol></ul>e",
            "- a\n- b\n  3. c\n  5. d\n\ne",
        ),
        ("<ol start=" + "9" * 5000 + "><li>a</ol><ol start=x><li>b</ol>", "1. a\n\n1. b"),
        ("<pre>\n  x\n<b>y</b>  z\n</pre>", "```\n  x\ny  z\n```"),
        ("<pre>```</pre>", "````\n```\n````"),
        (
            "<table><caption>C<tr><th>a<th>b<tr><td>1<td><tr><td><td>2</table>x",
            "C\na | b\n1 |\n| 2\n\nx",
        ),
        ("<table><tr><td>a<br>b<td>c</table>", "a b | c"),
        ("<table><tr><td><p>a</p><p>b</p><td>c</table>", "a\n\nb\n\nc"),
        ("<math><mi>x</mi><mo>+</mo></math>", "x+"),
        ("<math display=block alttext='x_1'><mi>x</mi></math>", "$$x_1$$"),
        (
            "<math><semantics><mi>x</mi><annotation encoding='application/x-tex'>x^2"
            "</annotation></semantics></math>",
            "$x^2$",
        ),
        ("a <script type='math/tex'>y</script> b<script>1</script>", "a $y$ b"),
        ("<img src=a.png><img src=x.gif data-src=b.png>c", "[a.png][b.png]c"),
        ("<dl><dt>a<dd>b</dl><blockquote>c</blockquote>", "a\nb\n\nc"),
        ("<p><!-- no --><template>no</template><noscript>no</noscript>", ""),
        ("", ""),
        ("<div>" * 5000 + "deep", "deep"),
        ("</p></ul></li>stray</td>", "stray"),
    ],
)
def test_html_is_what_a_reader_sees(html: str, text: str) -> None:
    assert plain(html) == text


def test_pages_that_would_take_hours_are_no_documents() -> None:
    assert plain("<p>a<li>b" * 30_000).startswith("a\n\n- b")
    with pytest.raises(Unusable, match="20,000 elements inside each other"):
        plain("<DIV>" * 20_001)


def test_pages_find_their_images_and_count_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    (site / "posts").mkdir(parents=True)
    (site / "assets").mkdir()
    (site / "assets" / "a.png").write_bytes(picture(1, "PNG"))
    (site / "assets" / "drawing.svg").write_bytes(b"<svg/>")
    (site / "posts" / "two words.jpg").write_bytes(picture(2))
    (site / "posts" / "50%25.jpg").write_bytes(picture(3))
    (site / "posts" / "text.jpg").write_bytes(b"<!DOCTYPE html>")
    encoded = base64.b64encode(picture(4, "GIF")).decode()
    (site / "posts" / "a.md").write_text(
        "---\ntitle: no\n---\n# One\n![alt](/assets/a.png)\n\nTwo ![](<two words.jpg>) three "
        f"![](../assets/a.png?raw=true#x) ![](data:image/gif;base64,{encoded}) "
        "![](https://x.org/a.png) ![](//x.org/a.png) ![](/assets/drawing.svg) ![]() "
        "![](text.jpg) ![](none.png) ![](50%25.jpg) ![](data:image/bmp;base64,Qk0=)\nend."
    )
    (site / "posts" / "b.md").write_text("![only](/assets/a.png)")
    (site / "posts" / "c.md").write_bytes(b"caf\xe9")
    (site / "posts" / "d.md").write_text("only text")
    run(
        "markdown", "--input", site / "**" / "*.md", "--image-root", site, "--out", tmp_path, *WHOLE
    )
    assert read(Kind.interleaved, tmp_path) == [
        ["# One", picture(1, "PNG"), "Two", picture(2), "three", picture(1, "PNG"),
         picture(4, "GIF"), picture(3), "end."],
        ["only text"],
    ]  # fmt: skip
    said = capsys.readouterr().out
    check_reported(
        said,
        "2 image given by a URL, never fetched: left out of its document",
        "1 SVG image: left out of its document",
        "1 image without a link: left out of its document",
        "2 image that is not JPEG, PNG, WebP or GIF: left out of its document",
        "1 image that cannot be read: left out of its document",
        "1 no text in the document",
        "1 not UTF-8",
    )
    assert f"{site}/posts/a.md none.png\n" in said


def test_html_files_are_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    page = "<html><head><title>x</title></head><body><h1>A</h1><img src=a.jpg><p>text <svg/></html>"
    (tmp_path / "a.html").write_text(page)
    run("html", "--input", tmp_path / "a.html", "--out", tmp_path / "out", *WHOLE)
    assert read(Kind.interleaved, tmp_path / "out") == [["# A", picture(1), "text"]]
    check_reported(capsys.readouterr().out, "1 SVG image: left out of its document")
