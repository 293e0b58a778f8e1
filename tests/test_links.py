"""Relative links in the documents lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if not {".venv", "runs"} & set(path.relative_to(ROOT).parts)]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = [link for link in LINK.findall(document.read_text()) if not re.match(r"[a-z]+:", link)]
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing
