"""The options of DeiT's code and of timm's train.py: what each is here, or why it isn't."""

import re
import shlex
from pathlib import Path

import pytest

import run_with_submitit
from config import (
    PEERS,
    Config,
    get_parser,
    is_option,
    load,
    option_here,
    peer_options,
    same_default,
)
from config.job import SHARED_DIR
from config.peers import flags, names_elsewhere
from errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
# The commands of facebookresearch/deit's README_deit.md and README_revenge.md, one a line.
COMMANDS = (Path(__file__).parent / "deit_commands.txt").read_text(encoding="utf-8").splitlines()

# What is not taken from them, and what the error tells the user to do. DeiT's own parser takes
# the first alone.
REFUSED = {
    "--use_volta32": "here it is --constraint: .* e.g. --constraint volta32gb",
    "--nb-classes": "classes are counted from the data: leave it out",
    "--repeated-aug--bce-loss": "a space is missing: --repeated-aug --bce-loss",
}
TIMES = {"--use_volta32": 2, "--nb-classes": 18, "--repeated-aug--bce-loss": 1}  # commands


def read(command: str) -> Config:
    """The options of a command, with their rules, as the program reads them before it starts."""
    words = shlex.split(command)
    program = next(word for word in words if word.endswith(".py"))
    argv = words[words.index(program) + 1 :]
    if program == "main.py":
        return load(argv)
    [config] = run_with_submitit.load(argv)[1]
    return config


def read_in_parts(command: str) -> tuple[Config, list[str]]:
    """Its options without those of ``REFUSED`` that it is refused for, and these."""
    found = []
    while True:
        try:
            return read(command), found
        except UserError as error:
            text = str(error)
            [flag] = [flag for flag in REFUSED if text.startswith(f"unknown option {flag};")]
            found.append(flag)
            assert re.search(REFUSED[flag], text)
            words = command.split()
            place = words.index(flag)
            takes_value = flag == "--nb-classes"
            command = " ".join(words[:place] + words[place + 1 + takes_value :])


@pytest.fixture(scope="module")
def commands():
    """(options, options that are refused) of all commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SHARED_DIR, "shared")
        return [read_in_parts(command) for command in COMMANDS]


def test_commands_of_deits_readmes_are_accepted(commands):
    """But for three options: all 31 without them, 11 as they stand."""
    assert len(commands) == 31
    assert sum(not refused for _, refused in commands) == 11
    for flag, times in TIMES.items():
        assert sum(refused.count(flag) for _, refused in commands) == times
        assert sum(command.split().count(flag) for command in COMMANDS) == times


@pytest.mark.parametrize(
    "number, recipe, differ",
    [
        (8, "deit_small", set()),
        (9, "deit_tiny", set()),
        (10, "deit_base", {"batch_size"}),  # 16 processes there, 4 here
        (11, "deit_base_distilled", {"batch_size"}),
        (12, "deit_base_384", {"accum_steps"}),
        (13, "deit3_small", {"model", "opt", "model_ema", "bce_loss"}),  # --repeated-aug--bce-loss
        (14, "deit3_base", {"model", "opt", "model_ema"}),
        (17, "deit3_base_224", {"model", "finetune", "model_ema"}),
    ],
)
def test_recipes_hold_the_commands_of_the_readmes(commands, number, recipe, differ):
    theirs = commands[number][0].recipe()
    ours = load(["--config", str(ROOT / "configs" / f"{recipe}.yaml")]).recipe()
    assert {k for k in ours if ours[k] != theirs[k]} - {"data_path"} == differ
    if "opt" in differ:
        assert (theirs["opt"], ours["opt"]) == ("fusedlamb", "lamb")


def test_abbreviations_of_the_readmes_are_names():
    """argparse takes any beginning of a name that is the only one; here these two are declared."""
    given = load(["--batch", "7", "--dr", "0.5"])
    assert given.data.batch_size == 7 and given.schedule.decay_rate == 0.5
    with pytest.raises(UserError, match="unknown option --batch-siz; did you mean --batch-size"):
        load(["--batch-siz", "7"])


@pytest.mark.parametrize("peer", PEERS)
def test_every_option_of_a_peer_is_here_or_has_a_reason(peer):
    found = [(opt, option_here(opt)) for opt in peer_options(peer)]
    wrong = [opt.name for opt, here in found if opt.here and not here]
    assert not wrong, f"what they are here is no option: {wrong}"
    reasonless = [opt.name for opt, here in found if not here and not opt.why]
    assert not reasonless, f"not here, without a reason: {reasonless}"
    differ = [o.name for o, here in found if here and not o.why and not same_default(o, here)]
    assert not differ, f"another default, without a reason: {differ}"


def test_as_many_options_as_the_parsers_have():
    parsed = {peer: [opt for opt in peer_options(peer) if opt.parsed] for peer in PEERS}
    # DeiT: 75 and 7 flags, of which --no-model-ema, --no-repeated-aug, --no-train-mode and
    # --no-pin-mem belong to switches. timm: 172, and --config of its first parser.
    assert {peer: len(opts) for peer, opts in parsed.items()} == {"deit": 78, "timm": 173}
    assert sum(opt.launcher for opt in parsed["deit"]) == 7


@pytest.mark.parametrize(
    "flag, hint",
    [
        ("--workers", "here it is --num-workers"),
        ("-j", "here it is --num-workers"),
        ("--checkpoint_hist", "here it is --keep"),
        ("--num-classes", "classes are counted from the data: leave it out"),
        ("--split-bn", "not here: batch norm sees all splits"),
        ("--nodes", "run_with_submitit.py takes --nodes"),
        ("--use_volta32", "run_with_submitit.py takes --constraint"),
        ("--lr--epochs", "a space is missing: --lr --epochs"),
        ("--lr--epoch", "did you mean"),
        ("--learning-rate", r"did you mean --lr\?"),
        ("--learning_rate", r"did you mean --lr\?"),
        ("--nb_classes", "classes are counted from the data: leave it out"),
        ("--imgsz", r"did you mean --input-size\?"),
        ("--img-size", "here it is --input-size"),
        ("--bs", r"did you mean --batch-size\?"),
        ("--wd", r"did you mean --weight-decay\?"),
        ("--num-epochs", r"did you mean --epochs\?"),
        ("--output", "here it is --output-dir"),
    ],
)
def test_a_peers_option_is_answered_with_what_to_take(flag, hint):
    with pytest.raises(UserError, match=f"unknown option {flag}; {hint}") as caught:
        get_parser().parse_args([flag, "3"])
    assert "`" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_peers_option_in_a_config_file(write_yaml):
    path = write_yaml("checkpoint_hist: 3\n")
    with pytest.raises(UserError, match="unknown option 'checkpoint_hist'; here it is --keep"):
        load(["--config", path])


def test_names_elsewhere_are_of_options_and_no_others():
    known = {
        flag.lstrip("-") for peer in PEERS for opt in peer_options(peer) for flag in flags(opt)
    }
    known = {name.replace("_", "-") for name in known}
    for name, option in names_elsewhere().items():
        assert is_option(option) and not is_option(name) and name not in known, name
