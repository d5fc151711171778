"""outputs/names.py: names in tables and charts."""

import csv
import io
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from outputs.names import any_glyphs, chart_label, csv_cell, csv_path, from_csv_cell


@pytest.mark.parametrize(
    "name",
    [
        "=cmd|' !A0",
        "+1+1",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "＝1",
        "'=1",
        "-",
        "-x",
    ],
)
def test_formulas_get_an_apostrophe(name):
    assert csv_cell(name) == f"'{name}"
    assert from_csv_cell(csv_cell(name)) == name


@pytest.mark.parametrize("name", ["cat", "", "-1", "+2.5e-3", "-.5", "a=1", "'", "'cat", "1-2"])
def test_other_text_stays(name):
    assert csv_cell(name) == name == from_csv_cell(name)


@given(st.text(alphabet="'=-+@1.e\ta", max_size=6))
def test_every_text_comes_back(text):
    file = io.StringIO()
    csv.writer(file).writerow((csv_cell(text), "x"))
    [[cell, _]] = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert from_csv_cell(cell) == text


def test_a_path_leads_to_the_same_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "=1.png").write_text("x")
    assert csv_path("=1.png") == "./=1.png"
    assert (tmp_path / csv_path("=1.png")).read_text() == "x"
    assert csv_path("/a/=1.png") == "/a/=1.png"


@pytest.mark.parametrize(
    "name", [r"$\frac{$", "$5 and $6", "\\$", "a\nb", "\x1b[31m", "x" * 300, "\U0001f63a 猫"]
)
def test_charts_take_any_name(name):
    """matplotlib takes an even number of dollars for a formula, and fails at a wrong one."""
    label = chart_label(name)
    assert len(label.replace(r"\$", "$")) <= 40 and label.isprintable()
    figure = Figure()
    text = figure.subplots().set_title(label)
    assert text._preprocess_math(label)[0] == label.replace(r"\$", "$")
    with warnings.catch_warnings(), any_glyphs():
        warnings.filterwarnings("error", "(?!Glyph)")
        figure.savefig(io.BytesIO(), format="svg")
