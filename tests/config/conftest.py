"""What the tests of ``config/`` share."""

import pytest


@pytest.fixture
def write_yaml(tmp_path):
    """Writes a text to a file of the test's folder and returns its path."""

    def write(text: str, name: str = "c.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
