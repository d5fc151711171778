"""Impossible combinations of options, and options without effect.

Also of config/augmentation_rules.py.
"""

import ast
import sys
from pathlib import Path

import pytest

from config import augmentation_rules, conflicts, load, rules, to_yaml, unused
from errors import OptionError

# --- conflicts ------------------------------------------------------------------------------------

SPLITS = "--aug-splits 3 --mixup 0 --cutmix 0"
CONFLICTS = [
    ("lora", "--lora 4 --attn-only"),
    ("model_kwargs", "--model-kwargs depth"),
    ("src", "--src --train-crop-mode rkrc"),
    ("color_jitter", "--color-jitter 0.4 0.4"),
    ("color_jitter", "--color-jitter 0.4 0.4 0.4 0.6"),
    ("aug_splits", "--aug-splits 1 --mixup 0 --cutmix 0"),
    ("aug_splits", "--aug-splits 3"),
    ("jsd_loss", "--jsd-loss"),
    ("jsd_loss", f"{SPLITS} --jsd-loss --loss focal"),
    ("jsd_loss", f"{SPLITS} --jsd-loss --distillation-type hard --teacher-path t.pth"),
    ("jsd_loss", f"{SPLITS} --jsd-loss --task multilabel --data-set CSV"),
    ("cache", f"{SPLITS} --cache device"),
    ("background", "--background whit"),
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
    ("warmup_epochs", "--epochs 5 --warmup-epochs 5"),
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
    ("train_sizes", "--train-sizes 128"),
    ("train_sizes", "--train-sizes ²:0"),
    ("train_sizes", f"--train-sizes {'9' * 5000}:0"),
    ("unfreeze_at", "--unfreeze-at 3:head"),
    ("unfreeze_at", "--freeze blocks --unfreeze-at head"),
    ("unfreeze_at", "--freeze blocks --unfreeze-at x:head"),
    ("unfreeze_at", "--freeze blocks --unfreeze-at ²:head"),
    ("unfreeze_at", f"--freeze blocks --unfreeze-at {'9' * 5000}:head"),
    ("attn_only", "--attn-only --freeze blocks"),
    ("best_metric", "--best-metric ema_acc1 --no-model-ema"),
    ("best_metric", "--best-metric acc2"),
    ("log_to", "--log-to wandb comet"),
    ("class_weights", "--class-weights balancd"),
    ("sampler", "--sampler undersample"),
]


@pytest.mark.parametrize("name, line", CONFLICTS)
def test_conflict_names_its_option(name, line):
    with pytest.raises(OptionError) as caught:
        load(line.split())
    assert caught.value.option == name
    assert str(caught.value).startswith("--" + name.replace("_", "-"))


def test_every_conflict_is_tried_here():
    paths = {rules.__file__, augmentation_rules.__file__}
    yields = {
        (path, node.lineno)
        for path in paths
        for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8")))
        if isinstance(node, ast.Yield)
    }
    reached = set()

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in paths:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _, line in CONFLICTS:
            with pytest.raises(OptionError):
                load(line.split())
    finally:
        sys.settrace(before)
    assert len(yields) > 40 and not yields - reached


MESSAGES = [
    ("--background whit", "'whit' is no colour: give a name (white), #rrggbb in quotes, or drop"),
    ("--background #ffffff80", "'#ffffff80' is no colour"),
    ("--bce-loss --smoothing 0 --loss focal", "contradicts --loss focal: leave one out"),
    ("--cosub --loss ce", "is defined on BCE, not on --loss ce: leave --loss out"),
    ("--distillation-type soft", "soft needs a teacher: add --teacher-path FILE"),
    ("--augment-on device --aa trivial", "trivial takes one image at a time"),
    ("--augment-on device --transform mine", "--transform mine takes one image at a time: use cpu"),
    ("--color-jitter 0.4 0.4 0.4 0.6", "the hue must be at most 0.5, got 0.6"),
    ("--jsd-loss", "compares augmentation splits: add --aug-splits 3"),
    ("--aug-splits 3", "would be mixed with other images: add --mixup 0 --cutmix 0"),
    ("--fsdp --opt adafactor", "with --fsdp: adafactor looks at whole weights: use adamw, adam"),
    ("--epochs 4 --warmup-epochs 4.5", "4.5 leaves nothing of --epochs 4: lower it"),
    ("--sched constant --lr-noise 0.5", "is not defined for --sched constant"),
    ("--start-epoch 9 --epochs 8", "9 leaves nothing of --epochs 8"),
    ("--freeze * --unfreeze-at 3:", "'3:' is not EPOCHS:PATTERN"),
    ("--best-metric ema_acc5 --no-model-ema", "ema_acc5 needs --model-ema"),
    ("--best-metric test_ac1", "'test_ac1' is not logged; one of test_acc1, test_acc5"),
    ("--best-metric test_ac1", "(did you mean test_acc1?)"),
]


@pytest.mark.parametrize("line, message", MESSAGES)
def test_conflict_says_what_was_given(line, message):
    with pytest.raises(OptionError) as caught:
        load(line.split())
    assert message in str(caught.value)


def test_the_first_of_several_conflicts_is_raised():
    with pytest.raises(OptionError) as caught:
        load(
            [
                "--best-metric",
                "acc1",
                "--eval",
                "--fsdp",
                "--compile",
                "--epochs",
                "5",
                "--bce-loss",
            ]
        )
    assert caught.value.option == "bce_loss"


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
        "--fsdp --opt fusedLAMB",
        "--epochs 1 --warmup-epochs 0.5",
        "--eval --pretrained --epochs 1",
        "--sched multistep --decay-milestones 30 60",
        "--freeze * --unfreeze-at 0:head 3:blocks.*",
        "--best-metric test_loss",
    ],
)
def test_sound_combinations_pass(line):
    assert not list(conflicts(load(line.split())))


# --- options without effect -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, hint",
    [
        ("--decay-milestones 3", "--decay-milestones has no effect without --sched multistep"),
        ("--clip-mode agc", "--clip-mode has no effect without --clip-grad"),
        ("--mixup 0 --cutmix 0 --mixup-mode elem", "--mixup-mode has no effect without --mixup"),
        ("--no-model-ema --model-ema-decay 0.9", "--model-ema-decay has no effect"),
        ("--cutmix 0 --mixup-switch-prob 0.3", "--mixup-switch-prob has no effect without --mixup"),
        ("--class-map c.txt", "--class-map has no effect without --eval"),
        ("--color-jitter 0.4 0.4 0.4 0.1", "--color-jitter has no effect without --aa none, 3a or"),
        ("--eval --pretrained --class-map c.txt --valid-labels v --real-labels r", None),
        ("--ThreeAugment --reprob 0.5", "--reprob has no effect with --ThreeAugment, which never"),
        ("--ThreeAugment --recount 2", "--recount has no effect with --ThreeAugment"),
        ("--ThreeAugment --resplit", "--resplit has no effect with --ThreeAugment"),
        ("--ThreeAugment --reprob 0", None),
        ("--reprob 0.5 --recount 2", None),
        ("--clip-mode agc --clip-grad 1", None),
        ("--mixup-switch-prob 0.3", None),
        ("--cutmix 0 --cutmix-minmax 0.2 0.8 --mixup-switch-prob 0.3", None),
        ("--cutmix 0 --mixup-mode elem", None),
        ("--sched step --decay-epochs 10 --decay-rate 0.5", None),
    ],
)
def test_options_without_effect_are_named(line, hint):
    found = unused(load(line.split()))
    assert not found if hint is None else len(found) == 1 and found[0].startswith(hint)


def test_a_default_that_is_spelled_out_without_effect_is_told(tmp_path):
    """In a saved config all defaults are spelled out; on a command line somebody asked."""
    line = ["--ThreeAugment", "--reprob", "0.25"]
    told = "--reprob has no effect with --ThreeAugment, which never erases"
    assert told in unused(load(line))
    (tmp_path / "c.yaml").write_text(to_yaml(load(line)), encoding="utf-8")
    assert unused(load(["--config", str(tmp_path / "c.yaml")])) == []
