"""NAME=VALUE words of --model-kwargs and --opt-kwargs."""

import pytest

import config
from errors import OptionError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("1e-6", 1e-6),
        ("true", True),
        ("False", False),
        ("none", None),
        ("[2, 2]", [2, 2]),
        ("gelu", "gelu"),
        ("'4'", "4"),
        ("__import__('os').getcwd()", "__import__('os').getcwd()"),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_value_is_what_python_or_yaml_would_make_of_it(text: str, value: object) -> None:
    assert config.keywords("model_kwargs", [f"x={text}"]) == {"x": value}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["depth"], "'depth' is not NAME=VALUE"),
        (["a b=1"], "is not NAME=VALUE"),
        (["depth=1", "depth=2"], "depth is there twice"),
        (["img_size=32"], "img_size: use --input-size"),
        (["num_classes=3"], "leave it out"),
    ],
)
def test_other_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        config.load(["--model-kwargs", *words])


def test_yaml_takes_a_table_as_well_as_words(tmp_path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("model_kwargs: {depth: 2, act_layer: gelu, dims: [1, 2], on: true}\n")
    found = config.load(["--config", str(file)]).model.model_kwargs
    assert config.keywords("model_kwargs", found) == {
        "depth": 2,
        "act_layer": "gelu",
        "dims": [1, 2],
        "on": True,
    }
    file.write_text("model_kwargs: [depth=2]\n")
    assert config.load(["--config", str(file)]).model.model_kwargs == ("depth=2",)
