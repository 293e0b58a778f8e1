"""Relative links in the documents lead somewhere, and to a heading that is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if not {".venv", "runs"} & set(path.relative_to(ROOT).parts)]
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")


def anchors(document):
    """What links to headings of a document are called: lower case, blanks as hyphens, without other signs."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def links(document):
    """The files and headings that a document's relative links name."""
    found = [link for link in LINK.findall(document.read_text()) if not re.match(r"[a-z]+:", link[0])]
    return [(document.parent / path if path else document, anchor) for path, anchor in found]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    assert not [path for path, _ in links(document) if not path.exists()]
    assert not [(path, one) for path, one in links(document) if one and one not in anchors(path)]


def test_headings_are_named_as_links_name_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One (two, 3)\n\n[x](#one-two-3) [y](#other)\n\n```\n# comment\n```\n")
    assert anchors(page) == {"one-two-3"}
    assert links(page) == [(page, "one-two-3"), (page, "other")]
