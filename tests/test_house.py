"""The shape of the project: arrows between files point one way, documents say what is true."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from pages import blocks

import config
from tools import docs

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in ROOT.glob("*.py")}

# From the leaves up: a file imports only from rows above its own.
ROWS = (
    {"errors"},
    {"config", "talking_heads_triton"},
    {"utils", "talking_heads", "remote"},
    {"cait_models"},
    {"parallel", "rendezvous"},
    {"checkpoint", "samplers", "augment", "batch_ops", "models", "optim", "loggers", "lock"},
    {"batch_augment", "losses", "state"},
    {"datasets"},
    {"engine", "inference", "cache"},
    {"build"},
    {"resume", "trainer"},
    {"evaluation"},
    {"training"},
    {"main"},
    {"run_with_submitit"},
)


# The rooms that turn the whole configuration into what the others take.
KNOWING = {"config", "main", "training", "build", "resume", "trainer", "evaluation"}
KNOWING |= {"run_with_submitit"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names & FILES.keys()


def typing_only(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found |= {inner.module for inner in node.body if isinstance(inner, ast.ImportFrom)}
    return found


def test_every_file_has_its_row():
    assert set().union(*ROWS) == FILES.keys()


@pytest.mark.parametrize("name", sorted(FILES))
def test_arrows_point_one_way(name):
    row = next(i for i, files in enumerate(ROWS) if name in files)
    below = set().union(*ROWS[:row])
    # "datasets" in datasets.py is the Hugging Face package of that name.
    assert imported(FILES[name]) - typing_only(FILES[name]) - {name} <= below


def test_only_the_launchers_know_the_whole_configuration():
    knowing = {n for n, p in FILES.items() if re.search(r"\bConfig\b", p.read_text())}
    assert knowing <= KNOWING


def test_options_page_is_up_to_date():
    assert docs.PATH.read_text(encoding="utf-8") == config.options_table()


def commands() -> list[tuple[str, str]]:
    """(document, arguments) of each ``python main.py …`` in the documents and recipes."""
    found = []
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml")):
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
    if "--help" not in argv:
        config.load(argv)


def test_links_of_the_documents_lead_somewhere():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
