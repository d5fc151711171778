"""The page of all options."""

from config import all_options, options_table


def test_options_table_has_a_row_for_each():
    table = options_table()
    for opt in all_options():
        assert table.count(f"| `{opt.flag}` |") == 1
        assert f"## {opt.title}" in table


def test_rows_have_four_cells():
    rows = [line for line in options_table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(all_options())
    for row in rows:
        assert row.replace(r"\|", "").count("|") == 5
