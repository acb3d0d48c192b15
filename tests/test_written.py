"""Text of models and people on its way to the screen: nothing is lost, nothing takes long."""

from __future__ import annotations

import html
import re
import string
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipmerge_core.ui import safe_text as written
from ipmerge_core.ui.latex import DELIMITERS, LONGEST_FORMULA, find_atoms
from ipmerge_core.ui.safe_text import as_html, as_markdown, clean_text, show_text

SEEN = "abcXYZ019 \n\t.,:;+-=<>&\"'()[]{}|*_`~#$\\/!%^@é日"
MARKS = [
    *SEEN, "20. ", "**", "__", "```", "~~~", "``", "$$", r"\(", r"\)", r"\[", r"\]", r"\boxed{",
    r"\begin{align}", r"\end{align}", r"\frac{1}{2}", "&lt;", "<b>", "|-|-|", "| a | b |", "\n\n",
    "    ", "word", "\u202e", "\r\n", "\x1b", "\ud800",
]  # fmt: skip
texts = st.lists(st.sampled_from(MARKS), max_size=40).map("".join) | st.text(max_size=60)


class Page(HTMLParser):
    """Reads back what a message shows and which elements it makes."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.raw = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "input":
            self.raw = values["value"] or ""
        elif tag == "span" and "title" in values:
            self.text.append(values["title"] or "")  # what a formula was before it was set
            self.open.append("formula")
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        opened = self.open.pop()
        assert opened == ("formula" if opened == "formula" and tag == "span" else tag)

    def handle_data(self, data: str) -> None:
        if "formula" not in self.open:
            self.text.append(data)


def shown(text: str) -> str:
    return "".join(Page(show_text(text)).text)


# --- laws ------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(texts)
def test_every_letter_digit_and_sign_but_the_marks_of_the_closed_list_is_shown(text):
    """Fences, spans, tables and emphasis may take backticks, tildes, pipes, rules and stars."""
    marks = re.compile(r"[\s`~|:*-]")
    without_info = re.sub(r"(?m)^ {0,3}(```+|~~~+).*", "", clean_text(text))
    shown_signs = marks.sub("", shown(text))
    if "```" not in text and "~~~" not in text:
        assert shown_signs == marks.sub("", clean_text(text))
    else:
        rest = iter(shown_signs)
        assert all(sign in rest for sign in marks.sub("", without_info))


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=SEEN.replace("*", "").replace("`", "").replace("~", "").replace("|", "")))
def test_without_stars_code_and_pipes_the_text_itself_is_shown(text):
    assert shown(text) == text


@settings(max_examples=300, deadline=None)
@given(texts)
def test_the_page_is_well_formed_of_few_elements_and_carries_the_text(text):
    page = Page(show_text(text))
    assert page.open == []
    allowed = {"div", "input", "span", "strong", "em", "code", "pre"}
    assert set(page.tags) <= allowed | {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.tags.count("input") == 1
    assert page.raw == clean_text(text)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_outside_of_formulas_no_delimiter_is_left_that_the_page_would_set(text):
    markup = re.sub(
        r'<span class="formula" title="[^"]*">.*?</span>', "", show_text(text), flags=re.DOTALL
    )
    markup = re.sub(r"<input[^>]*>|<code>.*?</code>", "", markup, flags=re.DOTALL)
    assert not any(str(delimiter["left"]) in markup for delimiter in DELIMITERS)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_a_growing_text_is_shown_up_to_where_it_will_be_the_same(text):
    growing = Page(show_text(text, finished=False))
    assert growing.raw == clean_text(text)
    assert growing.open == []


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_plain_doors_keep_every_character(text):
    cleaned = clean_text(text)
    assert html.unescape(as_html(text)) == cleaned
    assert not set("<>\"'") & set(as_html(text))
    one_line = " ".join(cleaned.split())
    assert html.unescape(as_markdown(text)) == one_line
    left = re.sub(r"&#\d+;", "", as_markdown(text))
    assert not set(string.punctuation) & set(left)


@settings(max_examples=200, deadline=None)
@given(st.text() | texts)
def test_cleaning_takes_control_and_reordering_characters_only(text):
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned
    cleaned.encode("utf-8")
    for sign in cleaned:
        assert unicodedata.category(sign) != "Cc" or sign in "\n\t"
        assert unicodedata.bidirectional(sign) not in {"LRE", "RLE", "PDF", "LRO", "RLO"}
        assert unicodedata.bidirectional(sign) not in {"LRI", "RLI", "FSI", "PDI"}
    kept = [sign for sign in text if sign.isalnum()]
    assert [sign for sign in cleaned if sign.isalnum()] == kept


# --- the closed list -------------------------------------------------------------------------


FORMULAS = {
    "$x$": r"\(x\)",
    "$ x $": r"\( x \)",
    "$5$": r"\(5\)",
    "$a +\nb = c$": "\\(a +\nb = c\\)",
    "$$a$$": r"\[a\]",
    r"\[a\]": r"\[a\]",
    r"\(a\)": r"\(a\)",
    r"\boxed{\frac{1}{2}}": r"\(\boxed{\frac{1}{2}}\)",
    r"\begin{align} x &= 1 \end{align}": r"\[\begin{align} x &= 1 \end{align}\]",
    r"\begin{pmatrix}1\end{pmatrix}": r"\(\begin{pmatrix}1\end{pmatrix}\)",
    r"\begin{cases}\begin{cases}1\end{cases}\end{cases}": (
        r"\(\begin{cases}\begin{cases}1\end{cases}\end{cases}\)"
    ),
    r"$\text{two words}$": r"\(\text{two words}\)",
    r"\[ \text{if \(x\)} \]": r"\[ \text{if \(x\)} \]",
}
NO_FORMULAS = [
    "$5 and $6", "$5-$6", "US$5 to US$6", "($5) or ($)", "price $ 5 and $ 6", r"\$x\$", "$x", "$$",
    "$ $", "between $two words$ here", "$a\n\nb$", r"\( open", r"closed \) then \(", r"\\(x\\)",
    r"\( { \)", r"\( } \)", r"\(a \[ b\)", r"\boxed{3", r"\begin{verbatim}x\end{verbatim}",
    r"\begin{align}x\end{gather}", "`$x$`", "```\n$x$\n```", f"${'x' * (LONGEST_FORMULA + 1)}$",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_get_one_of_the_two_delimiters(text):
    assert html.escape(FORMULAS[text]) in show_text(text)
    assert [atom.delimiters is not None for atom in find_atoms(text)] == [True]


@pytest.mark.parametrize("text", NO_FORMULAS)
def test_what_is_not_surely_a_formula_is_text(text):
    assert "formula" not in show_text(text)


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("**Answer:** *in words*", "<strong>Answer:</strong> <em>in words</em>"),
        ("**a *nested word* b**", "<strong>a <em>nested word</em> b</strong>"),
        ("*one\ntwo*", "*one\ntwo*"),
        ("2*3*4 2**3**4 *x* **20** ***x*** a * b", "2*3*4 2**3**4 *x* **20** ***x*** a * b"),
        (r"\*not this\*", r"\*not this\*"),
        ("`a*b` ``c`d`` `` ` ``", "<code>a*b</code> <code>c`d</code> <code>`</code>"),
        ("`a\n\nb`", "`a\n\nb`"),
        ("```py\nx < 1\n```", "<pre><code>x &lt; 1</code></pre>"),
        ("a\n~~~~\n~~~\n~~~~~\nb", "a<pre><code>~~~</code></pre>b"),
        ("```\nnever closed", "```\nnever closed"),
        ("20.\n- 5\n> 3\n#### 17\n__x__", "20.\n- 5\n&gt; 3\n#### 17\n__x__"),
    ],
)
def test_marks_of_the_closed_list_and_no_others(text, markup):
    assert show_text(text).endswith(f'">{markup}</div>')


def test_a_table_needs_its_rule_and_shows_every_cell():
    markup = show_text("t\n|a|b|\n|:-|-:|\n|`1|2`|3|\n|4|\n|5|6|7|\nend")
    assert "t<table><thead><tr>" in markup
    assert '<td style="text-align:left"><code>1|2</code></td>' in markup
    assert '<td style="text-align:right"></td>' in markup
    assert markup.endswith("</table>|5|6|7|\nend</div>")
    assert "<table" not in show_text("a | b\n--- | --- | ---\n1 | 2")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (r"so \[ a +", "so "),
        ("so $$ a", "so "),
        (r"so \begin{align} a", "so "),
        (r"so \boxed{1", "so "),
        ("so $x", "so "),
        ("pay $5", "pay $5"),
        (r"done \(a\) and \(b", "done "),
        ("half a comma\\", "half a comma"),
        ("half \\fra", "half "),
        ("`code $x", "`code "),
        ("- 5\n", "- 5\n"),
        (r"\( long ago" + " word" * LONGEST_FORMULA, r"\( long ago"),
    ],
)
def test_a_growing_answer_holds_back_a_formula_that_is_not_closed(text, left):
    page = Page(show_text(text, finished=False))
    assert "".join(page.text).startswith(left)
    assert len(left) > 8 or "".join(page.text) == left or "done" in text


def test_a_growing_fence_is_code_at_once_and_its_end_is_not_awaited():
    assert "<pre><code>x = $1</code></pre>" in show_text("```\nx = $1", finished=False)


# --- work ------------------------------------------------------------------------------------


def test_finished_messages_are_prepared_once(monkeypatch):
    calls: list[str] = []
    prepare = written._show
    monkeypatch.setattr(
        written, "_show", lambda text, **more: calls.append(text) or prepare(text, **more)
    )
    for _ in range(10):
        show_text("a finished answer of this test")
    assert len(calls) == 1
