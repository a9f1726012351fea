"""Every code block of the README runs, in order, each section in a namespace of its own."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def sections():
    """The Python blocks under each heading, with the line at which each begins."""
    heading, found, start, lines = "", {}, None, []
    for number, line in enumerate(README.read_text().splitlines(), start=1):
        if start is None and (match := re.match(r"#+ (.*)", line)):
            heading = match.group(1)
        elif line == "```python":
            start, lines = number, []
        elif line == "```" and start is not None:
            found.setdefault(heading, []).append((start, "\n".join(lines)))
            start = None
        elif start is not None:
            lines.append(line)
    return found


@pytest.mark.parametrize("heading", sections())
def test_code_of_section(heading):
    namespace = {}
    for start, code in sections()[heading]:
        # Blank lines before the block, so that a traceback names the line of the README.
        exec(compile("\n" * start + code, str(README), "exec"), namespace)


def test_there_is_code():
    assert [len(blocks) for blocks in sections().values()] == [3]


def test_it_is_short_and_opens_with_a_picture():
    text = README.read_text()
    assert len(text) <= 10_000
    assert text.index("![") < text.index("## ")


@pytest.mark.parametrize("page", ["README.md", "notebooks/evidence/README.md"])
def test_every_link_to_a_file_finds_it(page):
    page = README.parent / page
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    files = [link for link in links if not link.startswith("http")]
    assert files
    assert [link for link in files if not (page.parent / link).exists()] == []


def test_the_evidence_is_small():
    files = (README.parent / "notebooks" / "evidence").rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 2_000_000
