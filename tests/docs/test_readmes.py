"""README.md and README.zh-CN.md say the same: blocks, code, links and tables are compared."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
CHINESE_CHARACTER = re.compile(r"[\u4e00-\u9fff]")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def blocks(text: str) -> list[str]:
    """Fenced blocks, with their language."""
    return re.findall(r"^```.*?^```", text, re.M | re.S)


def sections(text: str) -> list[str]:
    """The text cut at its headings, which begin each part; what stands in blocks is no heading."""
    return re.split(r"^(?=#+ )", prose(text), flags=re.M)[1:]


def code(text: str) -> list[str]:
    """What stands in backticks, sorted: another language may need another order."""
    return sorted(re.findall(r"`([^`\n]+)`", text))


def links(text: str) -> list[str]:
    """Targets of links and images, without the one that leads to the other README."""
    targets = re.findall(r"\]\(([^)]+)\)", text)
    return sorted(t for t in targets if t not in (ENGLISH, CHINESE))


def tables(text: str) -> list[tuple[int, int, list[list[str]]]]:
    """Rows, columns and the code in each row of each table."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", prose(text), re.M):
        rows = table.splitlines()
        found.append((len(rows), rows[0].count("|") - 1, [code(row) for row in rows]))
    return found


def numbers(text: str) -> list[str]:
    """Figures of the prose, code left out."""
    return sorted(re.findall(r"\d+(?:\.\d+)?", re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", text)))


def items(text: str) -> int:
    return len(re.findall(r"^- ", text, re.M))


PAIRS = list(zip(sections(read(ENGLISH)), sections(read(CHINESE)), strict=False))


def test_sections_are_the_same_in_number_and_depth():
    ours, theirs = ([s.partition(" ")[0] for s in sections(read(n))] for n in (ENGLISH, CHINESE))
    assert ours == theirs and len(ours) >= 6


def test_blocks_are_identical():
    assert blocks(read(ENGLISH)) == blocks(read(CHINESE))
    assert len(blocks(read(ENGLISH))) >= 3


def test_links_and_images_are_the_same():
    assert links(read(ENGLISH)) == links(read(CHINESE))
    assert f"]({CHINESE})" in read(ENGLISH) and f"]({ENGLISH})" in read(CHINESE)


def test_tables_have_the_same_rows_columns_and_code():
    assert tables(read(ENGLISH)) == tables(read(CHINESE))
    assert len(tables(read(ENGLISH))) >= 3


@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize("facts", (links, items), ids=lambda f: f.__name__)
def test_sections_hold_the_same_facts(facts, ours, theirs):
    assert facts(ours) == facts(theirs)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_sections_name_the_same_code(ours, theirs):
    """Each name in backticks is in the other file's section too."""
    assert set(code(ours)) == set(code(theirs))


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_figures_of_the_english_text_are_in_the_chinese(ours, theirs):
    """Spelt-out numbers (ten variants) and 1.5 against 1,5 aside, no figure is lost or changed."""
    assert set(numbers(ours)) == set(numbers(theirs))


def test_the_chinese_text_is_chinese():
    """Every paragraph, list item and table row with prose is translated."""
    text = prose(read(CHINESE))
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|\[English\].*", "", text)
    for line in text.splitlines():
        words = re.findall(r"[A-Za-z]{3,}", line)
        if len(words) >= 4:
            assert CHINESE_CHARACTER.search(line), line
    assert len(CHINESE_CHARACTER.findall(text)) > 800
