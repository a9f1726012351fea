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
    assert len(sections()) >= 5
