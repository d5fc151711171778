"""The declared options: DeiT's names and defaults, and what every declaration must have."""

import pytest

from config import all_options, by_name, convert, get_parser, peer_options

DEIT = [opt for opt in peer_options("deit") if opt.parsed and not opt.launcher]

# Those whose default is ours: DeiT has a folder of its cluster, cuda, 10 workers, 10 epochs that
# its loop never reaches, and evaluation of everything on every process.
OURS = {
    "data-path": "",
    "device": "auto",
    "num_workers": "auto",
    "cooldown-epochs": 0,
    "dist-eval": True,
}


@pytest.mark.parametrize("theirs", DEIT, ids=lambda opt: opt.name)
def test_deits_option_is_here_with_its_default(theirs):
    opt = by_name(theirs.name)
    assert opt.default == OURS.get(theirs.name, theirs.default)
    assert getattr(get_parser().parse_args([]), opt.name) == opt.default


@pytest.mark.parametrize("theirs", DEIT, ids=lambda opt: opt.name)
def test_deits_spelling_is_accepted_on_the_command_line(theirs):
    words = {"opt-betas": ["0.9", "0.99"], "clip-grad": ["1"], "lr-noise": ["0.5"]}
    words |= {"cutmix-minmax": ["0.1", "0.9"]}
    switch = isinstance(theirs.default, bool)
    given = [] if switch else words.get(theirs.name, [str(theirs.default) or "thing"])
    spellings = {n for name in (theirs.name, *theirs.also) for n in (name, name.replace("_", "-"))}
    for name in (*spellings, theirs.name.replace("-", "_")):
        parsed = vars(get_parser(defaults=False).parse_args([f"--{name}", *given]))
        assert list(parsed) == [by_name(theirs.name).name]


SWITCHES = [opt.name for opt in DEIT if isinstance(opt.default, bool)]


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_turn_off_too(name):
    flag = name.replace("-", "_")
    parsed = vars(get_parser(defaults=False).parse_args([f"--no-{flag}"]))
    assert parsed == {by_name(name).name: False}


@pytest.mark.parametrize("opt", all_options(), ids=lambda o: o.name)
def test_default_is_a_value_of_its_option(opt):
    plain = list(opt.default) if isinstance(opt.default, tuple) else opt.default
    assert convert(opt, plain) == opt.default
    assert opt.help and opt.title


def test_all_numbers_have_bounds():
    free = {"mean", "freeze", "unfreeze_at", "plugin"}
    for opt in all_options():
        if "int" in opt.type_name or "float" in opt.type_name:
            bounds = [opt.bounds[k] for k in ("low", "above", "high", "below")]
            assert opt.name in free or any(b is not None for b in bounds), opt.name


def test_no_name_is_declared_twice():
    names = [name.lower() for opt in all_options() for name in (opt.name, *opt.aliases)]
    assert len({name.replace("_", "-") for name in names}) == len(names)
