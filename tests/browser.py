"""A Chromium that is told what to do, and that remembers what a page must not do."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", MAC)
AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()
VIOLATIONS = """addEventListener("securitypolicyviolation", (event) =>
    console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`));"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium or Chrome")
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=args)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Browser, url: str, *known: str, **options: Any) -> Iterator[Page]:
    """A page at url in a profile of its own, which in the end has complained of nothing and has
    asked no other host. known: patterns of complaints that are expected."""
    context = browser.new_context(**options)
    context.add_init_script(VIOLATIONS)
    context.set_default_timeout(20_000)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: said.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    page.goto(url)
    page.wait_for_selector("#title:not(:empty), dialog[open]")
    yield page
    strange = [text for text in said if not any(re.search(k, text) for k in known)]
    others = [u for u in asked if not u.startswith((url, f"blob:{url}"))]
    context.close()
    assert asked and not strange and not others, strange + others


def faults(page: Page) -> list[str]:
    """What axe-core finds that is serious."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 15
    return [
        f"{v['id']}: {n['html']} {n['failureSummary']}"
        for v in found["violations"]
        for n in v["nodes"]
        if v["impact"] in ("serious", "critical")
    ]
