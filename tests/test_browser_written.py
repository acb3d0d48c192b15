"""Texts in a real chat in a real Chromium: what is on screen is what was written."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator

import pytest
from browser_fixtures import free_port, serving
from hypothesis import HealthCheck, Phase, given, settings
from playwright.sync_api import Browser, Locator, Page, expect
from test_written import texts

from ipmerge_core.ui.safe_text import clean_text, show_text

LOADING = 60_000  # milliseconds
pytestmark = pytest.mark.browser

# Shown exactly as they are, line by line.
EXACT = [
    "20.",
    "20.\n15.\n7.",
    "1. one\n3. three",
    "3~5 m, at most 6~8 m",
    "~~struck~~ and ~one~",
    "- 5",
    "-5",
    "+ 5\n* 5",
    "> 3",
    "> 3\n> 4",
    "#### 17",
    "# 1",
    "#",
    "Title\n=====\nor\n-----",
    "---",
    "***",
    "__init__ and _x_",
    "&lt;b&gt; &amp; &#42; &nbsp;",
    "<b>bold</b> <!-- hidden --> <script>alert(1)</script>",
    "<think>why</think> 4",
    '<div class="written"><input type="hidden" value="x">',
    "![p](http://example.invalid/p.png)",
    "[text](http://example.invalid) and [ref]\n\n[ref]: http://example.invalid",
    "https://example.invalid/a*b*c_d_e?x=1&lt=2 and www.example.invalid, a@b.example",
    "    four spaces",
    "\tone tab",
    "first\n    indented\n      more\n    less",
    "two spaces at the end  \nand a line",
    "a\\\nb \\* \\_ \\# \\20",
    "It costs $5 and $6, or US$5 to US$6, $5-$6, ($5) or ($).",
    "2*3*4=24, 2 * 3 * 4, 2**3**4, a*b and (a)*(b)*c",
    "*5* **20** *x* ***x*** *a b* c*",
    "an open \\( stays, so does \\[ and $$ and \\begin{align}",
    "closed first \\) then \\( open",
    "\\\\(x\\\\)",
    "`open and ``more",
    "~~~\nnever closed",
    "```\nnever closed",
    "| a | b |\nno rule below",
    "a | b\n--- | ---|--\n1 | 2",
    "%%%LATEX_BLOCK_0%%% and %%%",
    "|x| < 3 && y > 2",
    "{ { } \\{ }",
    "\\( { \\) and $ { $",
    "price: $ 5 and $ 6",
    "日本語 ** と العربية עברית é 👩‍👩‍👧",
    "a  b   c",
    "\"quotes\" 'single' “curly”",
    "line\n\n\nthree further down",
    "\\boxed{3",
    "\\boxed{}",
]
# Shown without their marks; formulas are counted.
RENDERED = {
    "**bold** and *italic words*": "bold and italic words",
    "**Answer:** 20": "Answer: 20",
    "`a*b` and ``c`d`` and `` ` ``": "a*b and c`d and `",
    "```python\nx = 1 < 2\n# no heading\n```": "x = 1 < 2\n# no heading",
    "~~~\n3~5\n~~~": "3~5",
    "````\n```\ninner\n```\n````": "```\ninner\n```",
    "``````````\nten\n``````````": "ten",
    "日本語 **と** é": "日本語 と é",
    "first\n  a\n    b\n```\n  c\n    d\n```": "first\n  a\n    b\n  c\n    d",
    "before\n```mermaid\ngraph TD\n```\nafter": "before\ngraph TD\nafter",
    "| a | b |\n|---|---:|\n| 1 | `x|y` |": "a\tb\n1\tx|y",
}
FORMULAS = {
    r"\(a^2\)": 1,
    r"\[b = \frac{1}{2}\]": 1,
    "$$c$$": 1,
    "$x$ and $y_1$.": 2,
    "$ x $": 1,
    "$a +\nb = c$": 1,
    r"\begin{align} x &= 1 \\ y &= 2 \end{align}": 1,
    r"A = \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}": 1,
    r"\boxed{\frac{1}{2}}": 1,
    r"**Answer: $20$**": 1,
    r"\(a < b\) & \(c > d\) and \(x \lt y\)": 3,
    r"| $|x|$ | \(y\) |" "\n|-|-|\n| 1 | 2 |": 2,
    "`$x$` and ```\n$y$\n``` and `\\(z\\)`": 0,
    r"\text{$x$}": 1,
}
BROKEN = [r"\(\frac{1\over}\)", r"$\unknowncommand{x}$", r"\[ a & b \]", "$x_1_2$"]
UNSEEN = ["a\u202eb\u2066c\u200f", "a\x00b\x07c\x1b[0m\x7f", "a\r\nb\rc", "a\ud800b"]
PARTS = [
    "20. ", "- ", "> ", "# ", "*", "**", "_", "__", "~", "~~", "`", "``", "<b>", "&lt;", "|", "\n",
    "\n\n", "    ", "[a](b)", "![", "\\", "\\*", "word", "x", "7", "(", ")", " ", ".", "=", "+",
    "http://e.invalid/", "%%%", "<!--", "]]>", "é", ":", "---", "\t", "{", "}",
]  # fmt: skip


def jumbles(count: int = 120) -> list[str]:
    """Random texts without an even chance of a formula: their signs must all be on screen."""
    draw = random.Random(20)
    return ["q" + "".join(draw.choices(PARTS, k=14)) + "q" for _ in range(count)]


def generated() -> list[str]:
    """Texts that hypothesis makes, of the marks that Markdown, HTML and formulas know."""
    found: list[str] = []

    @settings(max_examples=150, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck), deadline=None)  # fmt: skip
    @given(texts)
    def collect(text: str) -> None:
        found.append(text)

    collect()
    return sorted({text for text in found if text.strip()} - {*FIXED})


FIXED = [*EXACT, *RENDERED, *FORMULAS, *BROKEN, *UNSEEN, *jumbles()]
ALL = [*FIXED, *generated()]
MADE = re.compile("<(?!/?div|input|span></span>)[a-z]+")  # an element of the closed list


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("written")
    (home / "texts.json").write_text(json.dumps(ALL), encoding="utf-8")
    command = ("tests/written_app.py", str(home / "texts.json"))
    with serving(home / "log", *command, port=free_port()) as address:
        yield address


@pytest.fixture(scope="module")
def page(url: str, chromium: Browser) -> Iterator[Page]:
    """One page for all tests: none changes it."""
    context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.add_init_script("window.alerts = 0; window.alert = () => { window.alerts += 1; };")
    open_chat(page, url)
    yield page
    context.close()


def open_chat(page: Page, url: str) -> None:
    page.goto(url)
    expect(said(page, "bot")).to_have_count(len(ALL), timeout=LOADING)
    formula = said(page, "bot").nth(ALL.index("$$c$$")).locator(".katex")
    expect(formula).to_have_count(1, timeout=LOADING)


def said(page: Page, who: str) -> Locator:
    return page.locator(f"#chat-a [data-testid={who}]")


def copy_button(page: Page, message: int) -> Locator:
    return page.locator("#chat-a .message-buttons").nth(message).get_by_role("button")


def texts_on(page: Page, who: str) -> dict[str, str]:
    shown = said(page, who).evaluate_all("nodes => nodes.map((node) => node.innerText)")
    return dict(zip(ALL, shown, strict=True))


def lines(text: str) -> list[str]:
    """The lines of a text without the white space at its ends and at the ends of lines."""
    return [line.rstrip().replace("\xa0", " ") for line in text.strip("\n").rstrip().split("\n")]


@pytest.mark.parametrize("who", ["user", "bot"])
def test_what_is_not_in_the_closed_list_is_on_screen_as_it_was_written(page, who):
    shown = texts_on(page, who)
    wrong = {text: shown[text] for text in EXACT if lines(shown[text]) != lines(text)}
    assert not wrong


def test_what_is_in_the_closed_list_loses_its_marks_and_nothing_else(page):
    shown = texts_on(page, "bot")
    wrong = {text: shown[text] for text in RENDERED if lines(shown[text]) != lines(RENDERED[text])}
    assert not wrong


def test_controls_and_reordering_characters_are_left_out(page):
    shown = texts_on(page, "bot")
    assert [lines(shown[text]) for text in UNSEEN] == [lines(clean_text(text)) for text in UNSEEN]
    assert lines(shown[UNSEEN[0]]) == ["abc"]


def test_no_jumble_of_signs_loses_a_letter_a_digit_or_a_sign(page):
    shown = texts_on(page, "bot")
    marks = re.compile(r"[\s*`~|:-]")  # of emphasis, code and tables: the list may take these
    for text in jumbles():
        assert marks.sub("", shown[text]) == marks.sub("", text), text
        if "`" not in text and "~~~" not in text and "|" not in text and "*" not in text:
            assert lines(shown[text]) == lines(text)


@pytest.mark.parametrize("who", ["user", "bot"])
def test_any_text_that_the_closed_list_leaves_alone_is_on_screen_as_it_was_written(page, who):
    shown = texts_on(page, who)
    alone = [text for text in ALL[len(FIXED) :] if not MADE.search(show_text(text))]
    assert len(alone) > 40
    wrong = {text: shown[text] for text in alone if lines(shown[text]) != lines(clean_text(text))}
    assert not wrong


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_are_set(page, text):
    bubble = said(page, "bot").nth(ALL.index(text))
    expect(bubble.locator(".katex")).to_have_count(FORMULAS[text])
    expect(bubble.locator(".katex-error")).to_have_count(0)


@pytest.mark.parametrize("text", BROKEN)
def test_a_formula_that_cannot_be_set_is_shown_as_it_was_written(page, text):
    bubble = said(page, "bot").nth(ALL.index(text))
    expect(bubble.locator(".katex-error")).to_have_count(0)
    assert lines(bubble.inner_text()) == lines(text)


def test_no_text_makes_an_element_loads_anything_or_runs(page):
    allowed = "p, span, div, input, pre, code, strong, em, table, thead, tbody, tr, th, td"
    for who in ("user", "bot"):
        outside = said(page, who).locator(f".written *:not({allowed}):not(.katex *)")
        expect(outside).to_have_count(0)
    assert page.evaluate("window.alerts") == 0


def test_messages_are_named_by_who_speaks_and_not_by_markup(page):
    expect(said(page, "bot").first).to_have_attribute("aria-label", "Answer")
    expect(said(page, "user").first).to_have_attribute("aria-label", "Question")


COPIED = [
    "20.\n15.\n7.",
    "&lt;b&gt; &amp; &#42; &nbsp;",
    r"\[b = \frac{1}{2}\]",
    "two spaces at the end  \nand a line",
]


@pytest.mark.parametrize("text", COPIED)
def test_the_copy_button_of_a_message_copies_what_was_written(page, text):
    copy_button(page, 2 * ALL.index(text) + 1).click()
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_the_copy_button_of_the_chat_copies_what_was_written(page):
    page.get_by_role("button", name="Copy conversation").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "written" not in copied.replace(EXACT[20], "")
    assert copied.startswith("user: 20.\n\nassistant: 20.\n\nuser: 20.\n15.\n7.\n\n")


def test_without_a_clipboard_the_text_is_copied_all_the_same(url, new_page):
    page = new_page()
    page.add_init_script(
        "delete Navigator.prototype.clipboard; window.copied = [];"
        "addEventListener('copy', ({ clipboardData }) => "
        "copied.push(clipboardData.getData('text/plain')))"
    )
    open_chat(page, url)
    copy_button(page, 3).click()
    assert "20.\n15.\n7." in page.evaluate("window.copied")
