"""mkdocs hook: the front page of the site is README.md, with its links as seen from docs/."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page: README.md for index.md, every other page as it is."""
    return re.sub(r"\]\(docs/", "](", README.read_text(encoding="utf-8")) if page.file.src_uri == "index.md" else markdown
