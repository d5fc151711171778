"""Options: names, types, bounds, precedence, YAML and the conflicts between them."""

import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import config
from config import COMMAND_LINE, DEFAULT, convert, load, options, read_yaml, to_yaml
from errors import OptionError, UserError

ROOT = Path(__file__).resolve().parent.parent


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- DeiT's options -------------------------------------------------------------------------------

# Name as DeiT's main.py spells it, and its default there.
DEIT = {
    "batch-size": 64, "epochs": 300, "bce-loss": False, "unscale-lr": False,
    "model": "deit_base_patch16_224", "input-size": 224, "drop": 0.0, "drop-path": 0.1,
    "model-ema": True, "model-ema-decay": 0.99996, "model-ema-force-cpu": False, "opt": "adamw",
    "opt-eps": 1e-8, "opt-betas": None, "clip-grad": None, "momentum": 0.9, "weight-decay": 0.05,
    "sched": "cosine", "lr": 5e-4, "lr-noise": None, "lr-noise-pct": 0.67, "lr-noise-std": 1.0,
    "warmup-lr": 1e-6, "min-lr": 1e-5, "decay-epochs": 30, "warmup-epochs": 5,
    "patience-epochs": 10, "decay-rate": 0.1, "color-jitter": 0.3, "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1, "train-interpolation": "bicubic", "repeated-aug": True, "train-mode": True,
    "ThreeAugment": False, "src": False, "reprob": 0.25, "remode": "pixel", "recount": 1,
    "resplit": False, "mixup": 0.8, "cutmix": 1.0, "cutmix-minmax": None, "mixup-prob": 1.0,
    "mixup-switch-prob": 0.5, "mixup-mode": "batch", "teacher-model": "regnety_160",
    "teacher-path": "", "distillation-type": "none", "distillation-alpha": 0.5,
    "distillation-tau": 1.0, "cosub": False, "finetune": "", "attn-only": False,
    "data-set": "IMNET", "inat-category": "name", "output_dir": "", "seed": 0, "resume": "",
    "start_epoch": 0, "eval": False, "eval-crop-ratio": 0.875, "pin-mem": True,
    "distributed": False, "world_size": 1, "dist_url": "env://",
}  # fmt: skip

# Those whose default is ours: DeiT says a folder of its cluster, cuda, 10 workers, 10 epochs that
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
    opt = config.by_name(name)
    assert opt.default == default
    assert getattr(config.get_parser().parse_args([]), opt.name) == default


@pytest.mark.parametrize("name, default", (DEIT | OURS).items())
def test_deits_spelling_is_accepted_on_the_command_line(name, default):
    words = {"opt-betas": ["0.9", "0.99"], "clip-grad": ["1"], "lr-noise": ["0.5"]}
    words |= {"cutmix-minmax": ["0.1", "0.9"]}
    given = [] if isinstance(default, bool) else words.get(name, [str(default) or "thing"])
    for flag in (f"--{name}", "--" + name.replace("_", "-"), "--" + name.replace("-", "_")):
        parsed = vars(config.get_parser(defaults=False).parse_args([flag, *given]))
        assert list(parsed) == [config.by_name(name).name]


@pytest.mark.parametrize("name", [n for n, d in DEIT.items() if isinstance(d, bool)])
def test_switches_turn_off_too(name):
    flag = name.replace("-", "_")
    parsed = vars(config.get_parser(defaults=False).parse_args([f"--no-{flag}"]))
    assert parsed == {config.by_name(name).name: False}


# --- types and bounds -----------------------------------------------------------------------------


def is_tuple(opt: config.Option) -> bool:
    return "…" in opt.type_name


def wrap(opt: config.Option, value: float):
    """``value`` as an element of a tuple that is long enough."""
    least = (opt.bounds["length"] or (1, 1))[0]
    return [value] * least if is_tuple(opt) else value


BOUNDS = [
    (opt, kind, opt.bounds[kind])
    for opt in options()
    for kind in ("low", "above", "high", "below")
    if opt.bounds[kind] is not None
]


@pytest.mark.parametrize("opt, kind, bound", BOUNDS, ids=lambda v: getattr(v, "name", None))
def test_every_bound_holds(opt, kind, bound):
    step = 1 if "float" not in opt.type_name else 1e-6
    inside = bound + step if kind in ("low", "above") else bound - step
    outside = bound - step if kind in ("low", "above") else bound + step
    convert(opt, wrap(opt, inside))
    with pytest.raises(OptionError, match=f"{opt.flag}: must be "):
        convert(opt, wrap(opt, outside))
    if kind in ("low", "high"):
        convert(opt, wrap(opt, bound))
    else:
        with pytest.raises(OptionError, match=f"{opt.flag}: must be {kind} "):
            convert(opt, wrap(opt, bound))


def test_all_numbers_have_bounds():
    free = {"mean", "freeze", "unfreeze_at", "plugin"}
    for opt in options():
        if "int" in opt.type_name or "float" in opt.type_name:
            bounds = [opt.bounds[k] for k in ("low", "above", "high", "below")]
            assert opt.name in free or any(b is not None for b in bounds), opt.name


LENGTHS = [opt for opt in options() if opt.bounds["length"]]


@pytest.mark.parametrize("opt", LENGTHS, ids=lambda o: o.name)
def test_lengths_of_tuples(opt):
    least, most = opt.bounds["length"]
    for count in range(least, most + 1):
        assert convert(opt, [0.5] * count) == (0.5,) * count
    for count in (least - 1, most + 1):
        if count:
            with pytest.raises(OptionError, match=f"{opt.flag}: takes .*got {count}"):
                convert(opt, [0.5] * count)


@pytest.mark.parametrize("opt", options(), ids=lambda o: o.name)
def test_default_is_a_value_of_its_option(opt):
    assert convert(opt, config._plain(opt.default)) == opt.default
    assert opt.help and opt.title


WRONG = [
    ("lr", "fast"), ("lr", True), ("lr", "nan"), ("lr", "inf"), ("lr", [0.1]), ("lr", None),
    ("epochs", 2.5), ("epochs", "three"), ("epochs", "inf"), ("epochs", True),
    ("repeated_aug", "maybe"), ("repeated_aug", 2), ("sched", "linear"), ("amp", True),
    ("num_workers", "many"), ("scale", "a b"), ("scale", {"low": 1}), ("model", ["a"]),
    ("model", True), ("clip_grad", "some"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG)
def test_wrong_type_names_the_option_and_what_it_expects(name, value):
    opt = config.by_name(name)
    with pytest.raises(OptionError, match=f"^{opt.flag}: expected ") as caught:
        convert(opt, value)
    assert opt.type_name in str(caught.value) and repr(value) in str(caught.value)


RIGHT = [
    ("lr", "1e-3", 1e-3), ("lr", 1, 1.0), ("epochs", "1e2", 100), ("epochs", 3.0, 3),
    ("seed", "4294967295", 2**32 - 1), ("amp", False, "off"), ("amp", "off", "off"),
    ("repeated_aug", "off", False), ("repeated_aug", 1, True), ("repeated_aug", "Yes", True),
    ("aa", "none", None), ("aa", None, None), ("aa", "trivial", "trivial"), ("aa", "", None),
    ("clip_grad", "None", None), ("clip_grad", "5", 5.0), ("num_workers", "auto", "auto"),
    ("num_workers", "0", 0), ("scale", "0.2 1", (0.2, 1.0)), ("scale", "0.2,1", (0.2, 1.0)),
    ("mean", 0.5, (0.5,)), ("freeze", "head", ("head",)), ("model", 5, "5"),
    ("sched", "poly", "poly"),
]  # fmt: skip


@pytest.mark.parametrize("name, raw, value", RIGHT)
def test_values_are_read_as_people_write_them(name, raw, value):
    converted = convert(config.by_name(name), raw)
    assert converted == value and type(converted) is type(value)


# --- command line ---------------------------------------------------------------------------------


def test_tuples_on_the_command_line():
    for words in (["0.2", "0.9"], ["0.2 0.9"], ["0.2,0.9"]):
        assert load(["--scale", *words]).augment.scale == (0.2, 0.9)
    assert load(["--lr-noise", "0.4", "--epochs", "9"]).schedule.lr_noise == (0.4,)


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


# --- files ----------------------------------------------------------------------------------------


def test_precedence_and_origins(tmp_path):
    write(tmp_path / "base.yaml", "lr: 0.1\nepochs: 11\nseed: 1\n")
    (tmp_path / "sub").mkdir()
    middle = write(tmp_path / "sub" / "middle.yaml", "base: ../base.yaml\nepochs: 12\nseed: 2\n")
    top = write(tmp_path / "top.yaml", "base: sub/middle.yaml\nseed: 3\nbatch-size: 7\n")
    c = load(["--config", top, "--batch_size", "8"], lambda given: {"lr": 0.7, "momentum": 0.5})
    assert (c.optim.lr, c.run.epochs, c.run.seed, c.data.batch_size) == (0.1, 12, 3, 8)
    assert c.optim.momentum == 0.5 and c.origin["momentum"] == config.CHECKPOINT
    assert c.origin["lr"].endswith("base.yaml")
    assert Path(c.origin["epochs"]).samefile(middle) and c.origin["seed"] == top
    assert c.origin["batch_size"] == COMMAND_LINE and c.origin["opt"] == DEFAULT
    assert {"lr", "epochs", "seed", "batch_size", "momentum", "config"} == c.explicit()


def test_underneath_is_told_what_was_given(tmp_path):
    path = write(tmp_path / "c.yaml", "seed: 3\n")
    seen = {}
    load(["--config", path, "--resume", "x.pth"], lambda given: seen.update(given) or {})
    assert seen["seed"] == 3 and seen["resume"] == "x.pth" and "lr" not in seen


def test_numbers_and_words_of_yaml(tmp_path):
    text = "lr: 1e-3\namp: off\nrepeated-aug: no\naa: none\nweight_decay: 1E-8\nscale: [0.1, 1]\n"
    c = load(["--config", write(tmp_path / "c.yaml", text)])
    assert c.optim.lr == 1e-3 and c.optim.amp == "off" and c.optim.weight_decay == 1e-8
    assert c.augment.repeated_aug is False and c.augment.aa is None
    assert c.augment.scale == (0.1, 1.0)


BAD_FILES = [
    ("warmup_epocs: 3", "unknown option 'warmup_epocs'; did you mean --warmup-epochs"),
    ("qqqq: 3", "unknown option 'qqqq'; --help"),
    ("lr: fast", "--lr: expected float, got 'fast'"),
    ("mixup_prob: 3", "--mixup-prob: must be at most 1, got 3"),
    ("scale: [0.1]", "--scale: takes 2 values, got 1"),
    ("- lr\n- seed", "expected 'option: value' lines"),
    ("lr: [1", "line 1"),
    ("a: b: c", "line 1, column"),
    ("batch_size: 3\nbatch-size: 4", "batch-size is there twice"),
    ("lr: 1" + "0" * 400, "--lr: expected float"),
    ("config: other.yaml", "config belongs on the command line; use base:"),
    ("base: missing.yaml", "missing.yaml does not exist"),
    ("base: c.yaml", "leads back to itself"),
]


@pytest.mark.parametrize("text, message", BAD_FILES)
def test_bad_file_is_named_with_its_fault(tmp_path, text, message):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(UserError) as caught:
        load(["--config", path])
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_base_files_may_not_go_in_circles(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml")
    write(tmp_path / "b.yaml", "base: a.yaml")
    with pytest.raises(OptionError, match="leads back to itself"):
        read_yaml(tmp_path / "a.yaml")


def test_unreadable_files(tmp_path):
    with pytest.raises(OptionError, match=r"--config: .*does not exist"):
        load(["--config", str(tmp_path / "no.yaml")])
    with pytest.raises(OptionError, match="can't be read"):
        load(["--config", str(tmp_path)])
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(OptionError, match="--config"):
        load(["--config", str(tmp_path / "bin.yaml")])


def test_empty_file_says_nothing(tmp_path):
    c = load(["--config", write(tmp_path / "c.yaml", "# nothing\n")])
    assert c.recipe() == load([]).recipe()


# --- saved config ---------------------------------------------------------------------------------


def values(tp, bounds) -> st.SearchStrategy:
    """What an option of that type may be."""
    origin, args = typing.get_origin(tp), typing.get_args(tp)
    low = bounds["low"] if bounds["low"] is not None else bounds["above"]
    high = bounds["high"] if bounds["high"] is not None else bounds["below"]
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values(arg, bounds) for arg in args])
    if origin is tuple:
        least, most = bounds["length"] or (0, 3)
        return st.lists(values(args[0], bounds), min_size=least, max_size=most).map(tuple)
    if tp is types.NoneType:
        return st.none()
    if tp is bool:
        return st.booleans()
    if tp is int:
        return st.integers(int(low or 0), int(high or 10**6))
    if tp is float:
        ends = {"exclude_min": bounds["above"] is not None}
        ends["exclude_max"] = bounds["below"] is not None
        return st.floats(low or 0.0, 1e6 if high is None else high, **ends)
    text = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1)
    return text.filter(lambda word: word.lower() not in ("none", "null"))


# Drawn one at a time, so that few of them conflict.
FREE = [opt for opt in options() if opt.name not in ("config", "print_config", "best_metric")]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_saved_yaml_comes_back_as_it_was(tmp_path_factory, data):
    opt = data.draw(st.sampled_from(FREE))
    value = data.draw(values(opt.type, opt.bounds))
    try:
        c = config.from_flat({opt.name: value}, {opt.name: "test"})
    except OptionError:
        reject()
    assert getattr(getattr(c, opt.section), opt.name) == value
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    again = load(["--config", write(path, to_yaml(c, origins=True, everything=True))])
    assert again.flat() | {"config": ""} == c.flat()


def test_saved_yaml_leaves_out_what_is_not_the_recipe():
    saved = yaml.safe_load(to_yaml(load(["--output-dir", "x", "--lr", "0.25", "--eval",
                                         "--resume", "r.pth"])))  # fmt: skip
    assert saved["lr"] == 0.25 and saved["opt"] == "adamw"
    transient = {opt.name for opt in options() if opt.transient}
    assert {"output_dir", "resume", "eval", "config", "start_epoch"} <= transient
    assert not transient & set(saved)
    assert set(saved) == {opt.name for opt in options()} - transient


def test_origins_are_comments(tmp_path):
    path = write(tmp_path / "c.yaml", "epochs: 12\n")
    lines = to_yaml(load(["--config", path, "--lr", "0.1"]), origins=True).splitlines()
    found = {line.split(":")[0]: line.split("  # ")[1] for line in lines if ":  #" not in line
             and "  # " in line}  # fmt: skip
    assert found["lr"] == COMMAND_LINE and found["epochs"] == path and found["opt"] == DEFAULT


def test_print_config_prints_what_config_takes(tmp_path):
    command = [sys.executable, "main.py", "--lr", "1e-3", "--amp", "off", "--print-config"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    again = load(["--config", write(tmp_path / "c.yaml", shown)])
    assert again.recipe() == load(["--lr", "1e-3", "--amp", "off"]).recipe()


def test_replace_checks_again():
    c = load([]).replace("here", lr=0.5)
    assert c.optim.lr == 0.5 and c.origin["lr"] == "here" and c.origin["opt"] == DEFAULT
    with pytest.raises(OptionError, match="--bce-loss"):
        c.replace("here", bce_loss=True)


def test_defaults_that_a_saved_config_spells_out_are_nobodys_wish(tmp_path):
    path = write(tmp_path / "c.yaml", to_yaml(load(["--ThreeAugment", "--lr", "0.1"])))
    again = load(["--config", path])
    assert again.explicit() == {"config", "ThreeAugment", "lr"}


# --- combinations ---------------------------------------------------------------------------------

CONFLICTS = [
    ("augment_on", "--augment-on device --aa augmix-m5-w4-d2"),
    ("cache", "--cache device --augment-on cpu"),
    ("amp", "--fsdp --amp fp16"),
    ("clip_mode", "--fsdp --clip-grad 0.1 --clip-mode agc"),
    ("rollback_fp32_steps", "--fsdp --on-nonfinite rollback --rollback-fp32-steps 9 --amp bf16"),
    ("model_ema_force_cpu", "--fsdp --model-ema-force-cpu"),
    ("unfreeze_at", "--fsdp --freeze * --unfreeze-at 0:head"),
    ("compile", "--fsdp --compile"),
    ("channels_last", "--fsdp --channels-last"),
    ("tb_histograms", "--fsdp --tb-histograms"),
    ("tb_graph", "--fsdp --tb-graph"),
    ("opt", "--fsdp --opt adafactor"),
    ("accum_steps", "--batch-size auto --accum-steps 2"),
    ("bce_loss", "--bce-loss"),
    ("bce_loss", "--bce-loss --smoothing 0 --loss ce"),
    ("talking_heads", "--talking-heads fused --amp off"),
    ("cosub", "--cosub --loss focal"),
    ("cosub", "--cosub --distillation-type hard --teacher-path t.pth"),
    ("distillation_type", "--distillation-type soft"),
    ("train_mode", "--distillation-type hard --teacher-path t.pth --no-train-mode"),
    ("teacher_path", "--teacher-path t.pth"),
    ("sampler", "--sampler balanced"),
    ("resplit", "--resplit --no-repeated-aug"),
    ("ThreeAugment", "--ThreeAugment --aa trivial"),
    ("scale", "--scale 1 0.5"),
    ("ratio", "--ratio 2 1"),
    ("cutmix_minmax", "--cutmix-minmax 0.5 0.5"),
    ("warmup_epochs", "--epochs 5"),
    ("decay_milestones", "--sched multistep"),
    ("lr_noise", "--sched onecycle --lr-noise 0.5"),
    ("lr_noise", "--sched plateau --lr-noise 0.5"),
    ("cooldown_epochs", "--sched onecycle --cooldown-epochs 1"),
    ("eval", "--eval"),
    ("start_epoch", "--start_epoch 9 --epochs 9"),
    ("mean", "--mean 0.1 0.2"),
    ("std", "--std 0.1 0.2"),
    ("rollback_fp32_steps", "--rollback-fp32-steps 9"),
    ("pretrained", "--pretrained --finetune f.pth"),
    ("unfreeze_at", "--unfreeze-at 3:head"),
    ("unfreeze_at", "--freeze blocks --unfreeze-at head"),
    ("unfreeze_at", "--freeze blocks --unfreeze-at x:head"),
    ("attn_only", "--attn-only --freeze blocks"),
    ("best_metric", "--best-metric ema_acc1 --no-model-ema"),
    ("best_metric", "--best-metric acc1"),
]


@pytest.mark.parametrize("name, line", CONFLICTS)
def test_conflict_names_its_option(name, line):
    with pytest.raises(OptionError) as caught:
        load(line.split())
    assert caught.value.option == name
    assert str(caught.value).startswith("--" + name.replace("_", "-"))


def test_every_conflict_is_tried_here():
    plain = load([])
    assert not any(wrong for wrong, _, _ in config._conflicts(plain))
    assert {name for _, name, _ in config._conflicts(plain)} <= {name for name, _ in CONFLICTS}


@pytest.mark.parametrize(
    "line",
    [
        "--bce-loss --smoothing 0",
        "--loss bce",
        "--cosub --smoothing 0 --bce-loss",
        "--distillation-type hard --teacher-path timm",
        "--sampler balanced --no-repeated-aug",
        "--ThreeAugment",
        "--ThreeAugment --aa none",
        "--epochs 1 --warmup-epochs 0.5",
        "--eval --pretrained --epochs 1",
        "--sched multistep --decay-milestones 30 60",
        "--freeze * --unfreeze-at 0:head 3:blocks.*",
        "--best-metric test_loss",
    ],
)
def test_sound_combinations_pass(line):
    load(line.split())


# --- help -----------------------------------------------------------------------------------------


def test_help_lists_everything_without_heavy_imports():
    code = (
        "import sys, main\n"
        "parser = main.get_args_parser()\n"
        "print(parser.format_help())\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'PIL', 'matplotlib', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for opt in options():
        assert opt.flag in run.stdout
        assert opt.title in run.stdout


def test_misspelled_option_is_one_line_and_code_2():
    command = [sys.executable, "-X", "importtime", "main.py", "--epoch", "3"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert run.returncode == 2
    assert lines == ["error: unknown option --epoch; did you mean --epochs?"]
    assert "torch" not in run.stderr


def test_options_table_has_a_row_for_each():
    table = config.options_table()
    for opt in options():
        assert table.count(f"| `{opt.flag}` |") == 1
        assert f"## {opt.title}" in table


def test_the_same_key_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("lr: 1\nepochs: 10\nlr: 2\n")
    with pytest.raises(OptionError, match="lr is there twice"):
        config.load(["--config", str(path)])


def test_texts_with_spaces_stay_whole(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("plugin: my folder/mine.py\n")
    assert config.load(["--config", str(path)]).run.plugin == ("my folder/mine.py",)
    given = config.load(["--plugin", "my folder/a.py", "b.py"]).run.plugin
    assert given == ("my folder/a.py", "b.py")


@pytest.mark.parametrize(
    "line, hint",
    [
        ("--decay-milestones 3", "--decay-milestones has no effect without --sched multistep"),
        ("--clip-mode agc", "--clip-mode has no effect without --clip-grad"),
        ("--mixup 0 --cutmix 0 --mixup-mode elem", "--mixup-mode has no effect without --mixup"),
        ("--no-model-ema --model-ema-decay 0.9", "--model-ema-decay has no effect"),
        ("--clip-mode agc --clip-grad 1", None),
        ("--sched step --decay-epochs 10 --decay-rate 0.5", None),
    ],
)
def test_options_without_effect_are_named(line, hint):
    found = config.unused(load(line.split()))
    assert not found if hint is None else len(found) == 1 and found[0].startswith(hint)
