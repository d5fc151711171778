"""The declared options: DeiT's names and defaults, and what every declaration must have."""

import pytest

from config import all_options, by_name, convert, get_parser

# Name as DeiT's main.py spells it, and its default there.
DEIT = {
    "batch-size": 64,
    "epochs": 300,
    "bce-loss": False,
    "unscale-lr": False,
    "model": "deit_base_patch16_224",
    "input-size": 224,
    "drop": 0.0,
    "drop-path": 0.1,
    "model-ema": True,
    "model-ema-decay": 0.99996,
    "model-ema-force-cpu": False,
    "opt": "adamw",
    "opt-eps": 1e-8,
    "opt-betas": None,
    "clip-grad": None,
    "momentum": 0.9,
    "weight-decay": 0.05,
    "sched": "cosine",
    "lr": 5e-4,
    "lr-noise": None,
    "lr-noise-pct": 0.67,
    "lr-noise-std": 1.0,
    "warmup-lr": 1e-6,
    "min-lr": 1e-5,
    "decay-epochs": 30,
    "warmup-epochs": 5,
    "patience-epochs": 10,
    "decay-rate": 0.1,
    "color-jitter": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1,
    "train-interpolation": "bicubic",
    "repeated-aug": True,
    "train-mode": True,
    "ThreeAugment": False,
    "src": False,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "resplit": False,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix-minmax": None,
    "mixup-prob": 1.0,
    "mixup-switch-prob": 0.5,
    "mixup-mode": "batch",
    "teacher-model": "regnety_160",
    "teacher-path": "",
    "distillation-type": "none",
    "distillation-alpha": 0.5,
    "distillation-tau": 1.0,
    "cosub": False,
    "finetune": "",
    "attn-only": False,
    "data-set": "IMNET",
    "inat-category": "name",
    "output_dir": "",
    "seed": 0,
    "resume": "",
    "start_epoch": 0,
    "eval": False,
    "eval-crop-ratio": 0.875,
    "pin-mem": True,
    "distributed": False,
    "world_size": 1,
    "dist_url": "env://",
}

# Those whose default is ours: DeiT has a folder of its cluster, cuda, 10 workers, 10 epochs that
# its loop never reaches, and evaluation of everything on every process.
OURS = {
    "data-path": "",
    "device": "auto",
    "num_workers": "auto",
    "cooldown-epochs": 0,
    "dist-eval": True,
}


@pytest.mark.parametrize("name, default", (DEIT | OURS).items())
def test_deits_option_is_here_with_its_default(name, default):
    opt = by_name(name)
    assert opt.default == default
    assert getattr(get_parser().parse_args([]), opt.name) == default


@pytest.mark.parametrize("name, default", (DEIT | OURS).items())
def test_deits_spelling_is_accepted_on_the_command_line(name, default):
    words = {"opt-betas": ["0.9", "0.99"], "clip-grad": ["1"], "lr-noise": ["0.5"]}
    words |= {"cutmix-minmax": ["0.1", "0.9"]}
    given = [] if isinstance(default, bool) else words.get(name, [str(default) or "thing"])
    for flag in (f"--{name}", "--" + name.replace("_", "-"), "--" + name.replace("-", "_")):
        parsed = vars(get_parser(defaults=False).parse_args([flag, *given]))
        assert list(parsed) == [by_name(name).name]


@pytest.mark.parametrize("name", [n for n, d in DEIT.items() if isinstance(d, bool)])
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
