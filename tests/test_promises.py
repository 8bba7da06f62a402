"""Every block of the pages that promise something names the tests that hold it, in a comment of its source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["docs/security.md", "docs/reproducibility.md"]


def blocks(page: str) -> list[str]:
    """Paragraphs, items of lists and rows of tables, without headings and code."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    text = re.sub(r"^(#.*|\|[-|]+\|)$", "", text, flags=re.M)
    parts = re.split(r"\n\s*\n|\n(?=- |\|)", text)
    return [part.strip() for part in parts if part.strip()]


def missing(block: str) -> str | None:
    """What a block lacks: a comment, or a test that it names."""
    comments = re.findall(r"<!-- (.*?) -->", block, flags=re.S)
    if not comments:
        return "names no test"
    if comments == ["not promised"]:
        return None
    for name in " ".join(comments).split():
        path, _, function = name.partition("::")
        file = ROOT / path
        if not path.startswith("tests/") or not file.is_file():
            return f"{path} is not a file of tests"
        if function and not re.search(rf"^def {function}\(", file.read_text(), flags=re.M):
            return f"{path} has no {function}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_its_tests(page):
    found = blocks((ROOT / page).read_text())
    introductions = ("Images, data sets, runs and model folders may come", "**Promised**", "**Not promised:**", "| change |", "| results |")
    # the rows of commands are held by test_the_commands_are_there
    own = [block for block in found if not block.startswith(introductions) and not re.match(r"\|.*\| `(python |pytest )?bench/", block)]
    assert len(own) > 20
    wrong = [f"{block[:90]!r}: {lack}" for block in own if (lack := missing(block))]
    assert not wrong, "\n".join(wrong)


def test_what_is_missing_is_found():
    here = "tests/test_promises.py::test_what_is_missing_is_found"
    assert missing(f"Something. <!-- {here} -->") is None
    assert missing("Something.") == "names no test"
    assert missing("Something. <!-- tests/test_promises.py::test_that_is_not -->") == "tests/test_promises.py has no test_that_is_not"
    assert missing("Something. <!-- docs/log.md -->") == "docs/log.md is not a file of tests"
    assert blocks("# A\n\nOne\ntwo.\n- x\n- y\n\n```sh\nz\n```\n| a |\n|---|\n| b |\n") == ["One\ntwo.", "- x", "- y", "| a |", "| b |"]


def test_the_commands_are_there():
    page = (ROOT / "docs/reproducibility.md").read_text()
    paths = set(re.findall(r"bench/[\w/]+(?:\.py)?", page))
    assert len(paths) > 12
    assert all((ROOT / path).exists() for path in paths), paths


def test_the_tables_are_those_of_the_results():
    command = [sys.executable, "bench/readme.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
