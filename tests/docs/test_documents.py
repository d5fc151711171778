"""All documents: commands are accepted, links lead somewhere, the options page is up to date.

Also of tools/docs.py.
"""

import importlib.util
import re
import shlex

import pytest
from pages import ROOT, blocks

import config
from config.metrics import metrics
from tools import docs

DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


@pytest.mark.parametrize("path", docs.pages(), ids=lambda path: path.name)
def test_generated_pages_are_up_to_date(path):
    text = path.read_text(encoding="utf-8")
    assert text == docs.pages()[path]
    assert "| default |" in text or "<!-- options: resume -->" in text


def test_tables_are_written_between_their_comments():
    text = "a\n<!-- options: deit launcher -->\nold\n<!-- end of options -->\nb\n"
    written = docs.with_tables(text)
    assert written.startswith("a\n<!--") and written.endswith("<!-- end of options -->\nb\n")
    assert "old" not in written and docs.with_tables(written) == written
    rows = re.findall(r"^\| `--(\w+)`", written, re.M)
    assert rows == [o.name for o in config.peer_options("deit") if o.launcher]


def commands() -> list[tuple[str, str]]:
    """(document, arguments) of each ``python main.py …`` in the documents and recipes."""
    found = []
    for path in (*DOCUMENTS, *ROOT.glob("configs/*.yaml")):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        text = re.sub(r" \\?\n#? {4,}", " ", text)
        for match in re.finditer(
            r"^[#$ ]*(?:python|torchrun[^\n]*?) main\.py ([^\n`]*)", text, re.M
        ):
            found.append((path.name, match[1]))
    return found


@pytest.mark.parametrize("document, arguments", commands())
def test_commands_of_the_documents_are_accepted(document, arguments, monkeypatch, tmp_path):
    """Their options exist, their values are in range and their combinations possible."""
    monkeypatch.chdir(ROOT)
    argv = shlex.split(arguments, comments=True)
    if "mine.yaml" in argv:  # shown by docs/train.md
        [recipe] = blocks("docs/train.md", "yaml")
        (tmp_path / "mine.yaml").write_text(recipe.replace("configs/", f"{ROOT}/configs/"))
        argv[argv.index("mine.yaml")] = str(tmp_path / "mine.yaml")
    measured = "fields-report/normalisation.yaml"  # by explore, in docs/images.md
    if measured in argv:
        (tmp_path / "measured.yaml").write_text("in_chans: 5\n")
        argv[argv.index(measured)] = str(tmp_path / "measured.yaml")
    if "--help" not in argv:
        config.load(argv)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_the_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


PACKAGES = "|".join(sorted(path.parent.name for path in ROOT.glob("*/__init__.py")))
TESTS = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
SCORES = [*metrics("classification"), *metrics("multilabel")]  # test_map is no test


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_tests_that_the_documents_name_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(rf"\b(?:{PACKAGES}|tests)/[\w/]+\.py\b", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(test_\w+)\*?`", text):
        assert name in SCORES or f"def {name}" in TESTS, name


# The changelog has former names too.
@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.name != "CHANGELOG.md"], ids=lambda path: path.name
)
def test_tools_that_the_documents_name_exist(path):
    for name in re.findall(r"(?:python -m |`)(tools\.\w+)", path.read_text(encoding="utf-8")):
        if name != "tools.NAME":
            assert importlib.util.find_spec(name), name
