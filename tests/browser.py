"""A headless Chromium that opens pages, and measurements of a page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Finds words that are not fully visible: outside the window, hidden by a box, or covered by other words.
UNREADABLE = """() => {
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("script, #tip") || !parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      let cut = box.left < -0.5 || box.right > innerWidth + 0.5;
      for (let e = parent; e && e !== document.body; e = e.parentElement) {
        if (getComputedStyle(e).overflowX === "visible") continue;
        const around = e.getBoundingClientRect();
        cut ||= box.left < around.left - 0.5 || box.right > around.right + 0.5;
      }
      if (cut) bad.push(node.textContent.trim().slice(0, 40));
    }
  }
  for (const labels of document.querySelectorAll(".xticks, .yticks, .levels, .names")) {
    const boxes = [...labels.children].map((e) => e.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
      const overlaps = a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 5 && b.top < a.bottom - 5;
      if (overlaps) bad.push("labels over one another in " + labels.className);
    }));
  }
  if (document.documentElement.scrollWidth > innerWidth) bad.push("the page scrolls sideways");
  return bad;
}"""


TWO_FRAMES = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a running browser; skip the test, with the reason, if there is none, but fail if CI requires one."""
    give_up = pytest.fail if os.environ.get("HARMCONVERT_NEEDS_BROWSER") else pytest.skip
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        give_up("no browser test without playwright: pip install 'harmconvert[dev]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        give_up("no browser test without Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except Error as error:
            give_up(f"Chromium does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


class Visit:
    """A page in a window of a given width, with its console messages and its requests."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.resolve().as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> str:
        """Return the text of the tip when the pointer is at (x, y) in an element, as shares of its width and height."""
        element = self.page.locator(selector).first
        element.scroll_into_view_if_needed()
        self.page.evaluate(TWO_FRAMES)  # scrolling hides a tip, and the event arrives one frame later
        box = element.bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        tip = self.page.locator("#tip")
        return str(tip.text_content()) if tip.is_visible() else ""
