"""The command line: spellings, errors in one line, help."""

from dataclasses import dataclass

import pytest

from config import all_options, get_parser, load, option, section_options
from errors import OptionError, UserError


def test_tuples_on_the_command_line():
    for words in (["0.2", "0.9"], ["0.2 0.9"], ["0.2,0.9"]):
        assert load(["--scale", *words]).augment.scale == (0.2, 0.9)
    assert load(["--lr-noise", "0.4", "--epochs", "9"]).schedule.lr_noise == (0.4,)


def test_texts_with_spaces_stay_whole():
    given = load(["--plugin", "my folder/a.py", "b.py"]).run.plugin
    assert given == ("my folder/a.py", "b.py")


@pytest.mark.parametrize("flag", ["--warmup-epoch", "--warmup_epocs", "--Warmup-Epochz"])
def test_unknown_option_names_the_nearest(flag):
    with pytest.raises(UserError, match=f"unknown option {flag}; did you mean --warmup-epochs"):
        load([flag, "3"])


def test_nonsense_is_refused():
    with pytest.raises(UserError, match="unknown option --qqqq; --help lists them"):
        load(["--qqqq"])
    with pytest.raises(UserError, match="unexpected argument 'train'"):
        load(["train"])
    with pytest.raises(UserError, match="--lr"):
        load(["--lr"])
    with pytest.raises(OptionError, match="--lr: must be at least 0, got -1"):
        load(["--lr", "-1"])
    with pytest.raises(OptionError, match="--sched: expected .*cosine.*got 'cos'"):
        load(["--sched", "cos"])


def test_abbreviations_are_not_guessed():
    with pytest.raises(UserError, match="unknown option --smooth"):
        load(["--smooth", "0"])


def test_aliases_and_case_do_not_matter():
    for flag in ("--ThreeAugment", "--three-augment", "--threeaugment", "--three_augment"):
        assert load([flag]).augment.ThreeAugment is True
    assert load(["--LR=0.5"]).optim.lr == 0.5


def test_values_that_look_like_options_stay_as_they_are():
    assert load(["--resume=my_run/no_model.pth"]).run.resume == "my_run/no_model.pth"


@dataclass(frozen=True)
class LauncherOptions:
    """Launcher"""

    nodes: int = option(1, "machines", low=1)


def test_launchers_options_are_taken_beside_those_of_the_run():
    parser = get_parser(defaults=False, launcher=section_options(LauncherOptions, "launcher"))
    assert vars(parser.parse_args(["--nodes", "2", "--lr", "1"])) == {"nodes": 2, "lr": 1.0}
    with pytest.raises(UserError, match=r"unknown option --node; did you mean --nodes\?"):
        parser.parse_args(["--node", "2"])


def test_help_has_every_option_and_its_default():
    # Without the line breaks, which may fall anywhere.
    text = " ".join(get_parser().format_help().split())
    for opt in all_options():
        assert opt.flag in text and opt.title in text
    assert "learning rate for an effective batch of 512 (default: 0.0005)" in text
    assert "length of the first cycle (default: a quarter of the epochs) --restart-mul" in text
