"""Hooks of mkdocs: pages that stand elsewhere in the repository, and the links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "teacher_cache/README.md": "store-format.md",
    "student/weights/MODEL_CARD.md": "model-card.md",
    "integrations/hloc/README.md": "integrations/hloc.md",
    "integrations/vismatch/README.md": "integrations/vismatch.md",
    "integrations/deep_image_matching/README.md": "integrations/deep-image-matching.md",
    "integrations/gluefactory/README.md": "integrations/gluefactory.md",
    "integrations/cpp/README.md": "integrations/cpp.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside ``docs/``."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the pages of the site; files that are no page are named without a link."""
    for source, target in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return re.sub(r"\[([^]]+)\]\(\.\./pipelines/configs/ablations\.yaml\)", r"\1", markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Show references of docstrings, such as :func:`match`, as plain code."""
    return re.sub(r":(?:func|class|mod|meth|data|attr):(<code)", r"\1", html)
