"""Plug-ins: what is said of one that can't be imported."""

import sys

import pytest

from errors import OptionError
from training.plugins import import_plugins


def test_a_plugin_takes_no_others_name(tmp_path):
    for name in ("utils", "random"):
        before = sys.modules.get(name)
        (tmp_path / f"{name}.py").write_text("")
        with pytest.raises(OptionError, match=f"{name}.py has the name of a module, .*: rename"):
            import_plugins([str(tmp_path / f"{name}.py")])
        assert sys.modules.get(name) is before


def test_plugins_of_one_name_take_turns(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "of_one_name.py"
        path.write_text(f"where = {folder!r}")
        import_plugins([str(path)])
        assert sys.modules["of_one_name"].where == folder


def test_names_of_our_datasets_where_the_other_package_is(tmp_path, monkeypatch):
    package = type(sys)("datasets")
    monkeypatch.setitem(sys.modules, "datasets", package)
    (tmp_path / "of_data.py").write_text("from datasets import ArraySource")
    with pytest.raises(OptionError, match="that is Hugging Face's package.*pipeline.sources.base"):
        import_plugins([str(tmp_path / "of_data.py")])
