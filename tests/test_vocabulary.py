"""Words that the glossary bans do not come back: neither in code, help and messages nor in docs.

Identifiers are split at underscores and capitals, so `frame_px`, `FramePx` and "frame px" are one phrase. Upper case counts as lower case.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

import slmsam2_cli

ROOT = Path(slmsam2_cli.__file__).parents[1]
GLOSSARY = ROOT / "docs" / "reference" / "glossary.md"
FOLDERS = ("slmsam2_cli", "tests", "benchmarks", "docs")
ENDINGS = {".py", ".md", ".j2", ".js", ".css", ".json"}
# They quote earlier words: history, measured rows, a library that is not ours, the glossary and this test.
EXEMPT = ("docs/changelog.md", "docs/experiments/", "docs/data/", "slmsam2_cli/assets/niivue/", "docs/reference/glossary.md")


def without_aliases(text: str) -> str:
    """Leave out the command line's table of hidden spellings: it must name the earlier ones."""
    return re.sub(r"^ALIASES = \{$.*?^\}$", "", text, flags=re.DOTALL | re.MULTILINE)


def words_of(text: str) -> str:
    """Lower-case words with single spaces: identifiers split at underscores, hyphens and capitals; an empty line ends a phrase."""
    text = re.sub(r"\n\s*\n", " . ", text)
    return re.sub(r"[\s_\-]+", " ", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)).lower()


def banned_words() -> list[str]:
    """Return the left column of the glossary's last table."""
    rows = GLOSSARY.read_text(encoding="utf-8").partition("## Words we do not use")[2].splitlines()
    return [row.split("|")[1].strip(" `") for row in rows if row.startswith("| `")]


@cache
def texts() -> dict[str, str]:
    """Read every text file of the project that is not exempt: relative path -> its words."""
    found = [ROOT / "README.md", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    kept = {path.relative_to(ROOT).as_posix(): path for path in found if path.suffix in ENDINGS and path != Path(__file__)}
    return {
        name: words_of(without_aliases(path.read_text(encoding="utf-8")))
        for name, path in sorted(kept.items())
        if not name.startswith(EXEMPT)
    }


def test_the_glossary_names_words_to_avoid() -> None:
    assert {"recogniser", "heeded", "foretold", "frame_px"} <= set(banned_words())


def test_identifiers_are_split_into_words() -> None:
    assert words_of("heededBy = frame_px  # End-stop") == "heeded by = frame px # end stop"


@pytest.mark.parametrize("banned", banned_words())
def test_a_banned_word_stands_nowhere(banned: str) -> None:
    pattern = re.compile(rf"(?<![a-z0-9]){re.escape(words_of(banned))}(?![a-z0-9])")
    assert [name for name, text in texts().items() if pattern.search(text)] == []
