"""Every link within the built site leads somewhere: to a file that is there, and to an anchor that it has."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.application import Sphinx
from sphinx.errors import SphinxError


class _Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "id" and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """Each link of the site's pages that leads nowhere within it, as ``page: link``."""
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            known = pages.get(site.resolve() / target.relative_to(site.resolve())) if target.exists() else None
            lost = known is not None and parts.fragment and unquote(parts.fragment) not in known.anchors
            if not target.exists() or lost:
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def check(app: Sphinx, error: Exception | None) -> None:
    """Raises SphinxError if a page has a dead link."""
    if error is None and app.builder.format == "html":
        found = dead_links(Path(app.outdir).resolve())
        if found:
            raise SphinxError("links that lead nowhere:\n" + "\n".join(found))


def setup(app: Sphinx) -> dict[str, Any]:
    """Tells Sphinx of the extension."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
