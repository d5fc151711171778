"""The shape of the project: one list of layers, sizes a reader can hold, the field's words."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the leaves up: packages and root modules. A file imports from its own package and from lower
# layers. This is the only list of them: what CONTRIBUTING.md shows is compared with it.
LAYERS = (
    ("errors", "bounded"),
    ("config", "architectures", "outputs"),
    ("utils", "cait_models"),
    ("models", "distributed", "samplers", "download"),
    ("augmentation", "checkpointing"),
    ("pipeline", "losses", "optimization"),
    ("teachers", "datasets", "inference"),
    ("engine",),
    ("loggers",),
    ("training",),
    ("main",),
    ("tools", "run_with_submitit", "hubconf"),
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# They use the project, and are no part of it.
OUTSIDE = ("tests", "examples", "output")

ROOT_MODULES = 16
FILE_LINES = 450
LONG_FILES = {"config/options.py": "the list of all options"}  # file -> reason
FUNCTION_LINES = 60
LONG_FUNCTIONS: dict[str, str] = {}  # "file.py:function" -> reason


@functools.cache
def all_files() -> tuple[Path, ...]:
    """The files below ROOT, without those of folders that begin with a point."""
    found = []
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(folder, name).relative_to(ROOT) for name in names]
    return tuple(sorted(found))


def python_files(*, tests: bool = False) -> list[Path]:
    """The project's files, and those of the tests with ``tests``."""
    outside = [name for name in OUTSIDE if not (tests and name == "tests")]
    return [p for p in all_files() if p.suffix == ".py" and p.parts[0] not in outside]


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def owner(module: str) -> str:
    """The package or root module that a module belongs to."""
    return module.partition(".")[0]


MODULES = {module_of(path): path for path in python_files()}


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports when it runs, inside functions too."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.add(submodule if submodule in MODULES else node.module)
    return names & MODULES.keys()


@functools.cache
def graph() -> dict[str, set[str]]:
    """The project's modules, and which others each imports."""
    return {module: imported(path) - {module} for module, path in MODULES.items()}


def test_every_file_belongs_to_a_layer():
    owners = {owner(module) for module in MODULES}
    assert owners == LAYER.keys(), owners ^ LAYER.keys()
    assert sum(len(names) for names in LAYERS) == len(LAYER)


def test_few_modules_lie_at_the_root():
    assert len([path for path in python_files() if len(path.parts) == 1]) <= ROOT_MODULES


def test_imports_point_to_lower_layers():
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if owner(other) != owner(module) and LAYER[owner(other)] >= LAYER[owner(module)]
    ]
    assert not wrong, wrong


def test_no_files_import_each_other_in_a_circle():
    """Files that import nothing but removed ones are removed, until none is left."""
    left = {module: set(others) for module, others in graph().items()}
    while leaves := {module for module, others in left.items() if not others}:
        left = {m: others - leaves for m, others in left.items() if m not in leaves}
    assert not left, f"circles among {sorted(left)}"


def test_nothing_inside_imports_datasets():
    """The name is for plugins and scripts: Hugging Face's package has it too."""
    assert [module for module, others in graph().items() if "datasets" in others] == []


def test_the_configuration_is_read_without_torch():
    code = "import sys, config; raise SystemExit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_tests_lie_like_what_they_test():
    found = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    folders = {path.parts[0] for path in found if len(path.parts) > 1}
    packages = {path.parts[0] for path in python_files() if len(path.parts) > 1}
    assert folders == packages | {"configs", "docs"}
    alone = {path.stem.removeprefix("test_") for path in found if len(path.parts) == 1}
    assert alone - MODULES.keys() <= {
        "structure",
        "cuda",
        "cuda_kinds",
        "pretended_cuda",
        "learning",
    }


def has_tests_of_its_name(source: Path, names: set[str]) -> bool:
    """Whether ``names`` of test files have one for a file, or for a package within its package."""
    inner = source.parts[1:-1]
    own = {source.stem, "_".join((*inner, source.stem))}
    return any(
        name in own or any(name == part or name.startswith(f"{part}_") for part in inner)
        for name in names
    )


def test_the_tests_of_a_file_are_found_by_its_name():
    """In a test file called like it, or in the one that begins with its path."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    texts = [ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in files]
    beside: dict[str, set[str]] = {}
    for path in files:
        beside.setdefault(path.parent.name, set()).add(path.stem.removeprefix("test_"))
    untested = [
        str(source)
        for source in python_files()
        if source.name not in ("__init__.py", "__main__.py")
        and not has_tests_of_its_name(
            source, beside[source.parts[0] if len(source.parts) > 1 else "tests"]
        )
        and not any(str(source) in text for text in texts)
    ]
    assert not untested, untested


def test_only_what_assembles_a_run_knows_the_whole_configuration():
    """What lies below takes the options it needs, as arguments or as one section."""
    below = {m: p for m, p in MODULES.items() if LAYER[owner(m)] < LAYER["training"]}
    knowing = {
        module
        for module, path in below.items()
        if re.search(r"\bConfig\b", (ROOT / path).read_text(encoding="utf-8"))
    }
    assert {owner(module) for module in knowing} <= {"config"}, knowing


@functools.cache
def lengths(path: Path | str) -> tuple[int, dict[str, int]]:
    """The lines of a file and of each of its functions."""
    text = (ROOT / path).read_text(encoding="utf-8")
    functions = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return len(text.splitlines()), functions


def test_files_are_short():
    long = {str(path): lengths(path)[0] for path in python_files(tests=True)}
    long = {name: lines for name, lines in long.items() if lines > FILE_LINES}
    # An exception that isn't needed any more goes from the table.
    assert long.keys() == LONG_FILES.keys(), long


def test_functions_are_short():
    long = {
        f"{path}:{name}": lines
        for path in python_files(tests=True)
        for name, lines in lengths(path)[1].items()
        if lines > FUNCTION_LINES
    }
    assert long.keys() == LONG_FUNCTIONS.keys(), long


# The field says image, images per second, worker, std, evaluate.
_UNIT = "second|step|epoch|class|process|batch|GPU|image|update|core|machine|run"
EVERYWHERE = re.compile(rf"\bpicture|\bimages an? (?:{_UNIT})\b|\ba image|loader process", re.I)
IN_DOCUMENTS = re.compile(r"\b(?:house|room|door|story|chapter|deviation|judged?|judges)\b", re.I)


def texts() -> list[Path]:
    suffixes = (".py", ".md", ".yaml", ".toml", ".html", ".txt", ".ipynb")
    return [p for p in all_files() if p.suffix in suffixes and p.parts[0] != "output"]


def test_the_words_are_those_of_the_field():
    found = []
    for path in texts():
        if path.name in (Path(__file__).name, "CHANGELOG.md"):  # they name the words
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            wrong = EVERYWHERE.findall(line)
            wrong += IN_DOCUMENTS.findall(line) if path.suffix == ".md" else []
            found += [f"{path}:{number}: {word}" for word in wrong]
    assert not found, "\n".join(found)


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading of CONTRIBUTING.md, up to the next one."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", CONTRIBUTING, re.M | re.S)[1]


def rows(title: str) -> list[list[str]]:
    """The cells of the rows of a section's table, without its head."""
    lines = re.findall(r"^\| (.*) \|$", section(title), re.M)
    return [line.split(" | ") for line in lines[1:]]


def test_the_layout_has_a_line_for_every_package():
    listed = [name for row in rows("Layout") for name in re.findall(r"`([\w/]+)/`", row[0])]
    packages = {path.parts[0] for path in python_files() if len(path.parts) > 1}
    beside = {"configs", "docs", "tests", "examples", "benchmarks"}
    assert len(listed) == len(set(listed))
    assert set(listed) == packages | beside
    assert all((ROOT / name).is_dir() for name in beside)


def test_the_layout_names_every_root_module():
    listed = {name for row in rows("Layout") for name in re.findall(r"`(\w+)\.py`", row[0])}
    assert listed == {path.stem for path in python_files() if len(path.parts) == 1}


def names_in(path: Path) -> set[str]:
    """Names that a file defines: functions, classes, methods, fields and constants."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_the_map_leads_to_files_and_names_that_exist():
    """Each line names a file first; names in backticks after it, without a dot, are defined
    there."""
    changes = rows("Where do I change …?")
    assert len(changes) >= 20
    for change, place in changes:
        current = None
        for word in re.findall(r"`([^`]+)`", place):
            if re.fullmatch(r"[\w./-]+(/|\.\w+)", word):
                current = ROOT / word
                assert current.exists(), f"{change}: {word}"
            elif re.fullmatch(r"\w+", word):
                assert current is not None, f"{change}: {word} comes before a file"
                if current.suffix == ".py":
                    assert word in names_in(current), f"{change}: no {word} in {current.name}"
                else:
                    assert word in current.read_text(encoding="utf-8"), f"{change}: {word}"


def test_nothing_but_sources_and_documents_is_kept():
    """No wheel, pickle or checkpoint that somebody left in the working tree."""
    line = ["git", "-C", str(ROOT), "ls-files", "-z"]
    shown = subprocess.run(line, capture_output=True, text=True, check=False)
    if shown.returncode:
        pytest.skip("not a clone")
    kinds = {Path(name).suffix for name in shown.stdout.split("\0") if name}
    assert kinds <= {"", ".py", ".md", ".txt", ".toml", ".yaml", ".json", ".png", ".html", ".ipynb"}
