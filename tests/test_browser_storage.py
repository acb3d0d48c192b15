"""A page whose browser refuses storage, as in a frame of another site with site data blocked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from explore_page import open_map
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

REFUSE = """for (const name of ["localStorage", "sessionStorage"]) {
  Object.defineProperty(window, name, {
    configurable: true,
    get() { throw new DOMException("The operation is insecure.", "SecurityError"); },
  });
}"""
SHOWN = {
    "Try it": "#tab-try textarea",
    "Merge": "#tab-merge button",
    "Compare": "#tab-compare .cmp, #tab-compare svg",
    "API & cite": "#tab-cite .cm-content",
    "Explore": "#layer-map .lm",
}


def test_refused_storage_costs_only_the_memory_of_a_visit(
    new_page: Callable[..., Page], app_url: str
) -> None:
    page = new_page()
    page.add_init_script(REFUSE)
    traffic = open_map(page, app_url)
    for name, content in SHOWN.items():
        page.get_by_role("tab", name=name, exact=True).click()
        expect(page.locator(content).first).to_be_visible()
    page.get_by_role("slider").first.press("ArrowRight")
    page.reload()
    expect(page.locator("#layer-map .lm")).to_be_visible()
    assert traffic.complaints == []
