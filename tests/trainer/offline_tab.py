"""A page in a real browser that has no network."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def offline_tab(
    browser: Any, html: str, path: Path, width: int, theme: str = "light"
) -> Iterator[Any]:
    """Yield the tab that shows a page at this width. Checks at the end that nothing failed, was
    executed or was requested from a network."""
    path.write_text(html)
    viewport = {"width": width, "height": 740}
    context = browser.new_context(viewport=viewport, offline=True, color_scheme=theme)
    tab = context.new_page()
    printed: list[str] = []
    requested: list[str] = []
    tab.on("console", lambda message: printed.append(message.text))
    tab.on("pageerror", lambda error: printed.append(str(error)))
    tab.on("dialog", lambda dialog: (printed.append("a name was executed"), dialog.dismiss()))
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(path.as_uri())
    yield tab
    assert printed == []
    assert [url for url in requested if not url.startswith("data:")] == [path.as_uri()]
    context.close()
