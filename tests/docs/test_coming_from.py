"""The figures of the pages for those who come from DeiT's code or timm's train.py."""

import re
import shlex

import pytest
import torch
from pages import ROOT, blocks
from timm.scheduler import CosineLRScheduler

import models
from architectures.factory import published_cfg
from augmentation.preprocessing import Preprocessing
from config import ScheduleOptions, load, option_here, peer_options
from errors import OptionError, UserError
from optimization.schedule import build_schedule
from pipeline.sources.registry import default_normalization
from samplers import RASampler

PAGE = (ROOT / "docs" / "coming-from-deit.md").read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    """The rows of the table below a heading, without its head."""
    text = re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)[1]
    lines = re.findall(r"^\| (.*) \|$", text, re.M)
    return [line.split(" | ") for line in lines[1:]]


def row(subject: str) -> str:
    [found] = [cells for cells in table("What behaves differently") if cells[0] == subject]
    return " ".join(found[1:])


def deits_rates(lr: float, epochs: int, *, warmup: int = 0, min_lr: float = 1e-5) -> list[float]:
    """The rate of each epoch in DeiT's loop: timm's cosine, told after each epoch its number."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    schedule = CosineLRScheduler(
        optimizer, epochs, lr_min=min_lr, warmup_lr_init=1e-6, warmup_t=warmup
    )
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(epoch)
    return rates


def test_commands_that_are_not_accepted_as_they_stand():
    """tests/config/test_peers.py has what is accepted."""
    commands = (ROOT / "tests" / "config" / "deit_commands.txt").read_text(encoding="utf-8")
    text = " ".join(PAGE.split())
    assert f"Of the {len(commands.splitlines())} commands in DeiT's READMEs" in text
    for flag, unit in (("use_volta32", " commands"), ("nb-classes", "")):
        assert f"`--{flag}` ({commands.count(f'--{flag}')}{unit})" in text


def test_learning_rates():
    theirs = deits_rates(1e-3, 300, warmup=5)
    ours = build_schedule(ScheduleOptions(), lr=1e-3, epochs=300, updates_per_epoch=1000)
    shown = table("The learning rate")
    assert len(shown) == 6
    for epoch, *rates in shown:
        first = 1000 * int(epoch)
        expected = (theirs[int(epoch)], ours.rate(first), ours.rate(first + 999))
        assert rates == [f"{rate:.4g}" for rate in expected]
    for epoch in range(299):
        assert ours.rate(1000 * epoch) == pytest.approx(theirs[epoch + 1], rel=1e-9)


def test_lowest_rate_above_the_peak():
    rates = deits_rates(1e-6, 30)
    assert rates == sorted(rates) and f"from {rates[0]:.2g}" == "from 1e-06"
    assert f"to {rates[-1]:.1e}" == "to 9.9e-06"
    assert "from 1e-6 to 9.9e-6 in 30 epochs with `--min-lr 1e-5`" in row(
        "`--min-lr` above the learning rate"
    )
    wanted = {"lr": 1e-6, "epochs": 30, "updates_per_epoch": 10}
    with pytest.raises(OptionError, match="--min-lr"):
        build_schedule(ScheduleOptions(), required={"min_lr"}, **wanted)
    assert build_schedule(ScheduleOptions(), **wanted).rate(300) == 0


# (images, processes, share of a process) as DeiT's RASampler gives them, run once.
DEITS_SHARES = [(1281167, 8, 160128), (50000, 4, 12480), (1000, 2, 384), (255, 1, 0)]


def test_shares_of_repeated_augmentation():
    ours = [(n, w, len(RASampler(n, num_replicas=w))) for n, w, _ in DEITS_SHARES]
    expected = [[*given, here] for given, (*_, here) in zip(DEITS_SHARES, ours, strict=True)]
    shown = [[int(cell) for cell in cells] for cells in table("Repeated augmentation")]
    assert shown == expected
    assert {160128 // 64, len(RASampler(1281167, num_replicas=8)) // 64} == {2502}
    assert "2502 with 8 processes of 64 images" in PAGE


def test_normalisation_of_cifar():
    for values in default_normalization("CIFAR100"):
        assert str(values) in row("mean and std of CIFAR without published weights")


def test_crops_of_published_weights():
    shown = row("size, crop, filter, mean and std with published weights")
    assert "crop 0.9 for DeiT at 224 pixels, 1 at 384 and for CaiT" in shown
    names = ("deit_base_patch16_224", "deit_base_patch16_384", "cait_S24_224")
    configs = [published_cfg(models.resolve_name(name)) for name in names]
    crops = [Preprocessing.of_model(cfg).crop_ratio for cfg in configs]
    assert crops == [0.9, 1.0, 1.0]


def test_error_that_the_page_shows():
    text = (ROOT / "docs" / "coming-from-timm.md").read_text(encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(["--checkpoint-hist", "3"])
    assert f"    error: {caught.value}\n" in text


# Without effect beside the others of the command.
UNUSED = {"decay-epochs", "model-ema-decay", "kd-temperature", "drop-connect"}


def test_command_with_timms_defaults():
    """It sets every option whose default is DeiT's to timm's value."""
    [command] = blocks("docs/coming-from-timm.md", "sh")
    config = load(shlex.split(command.replace("\\\n", ""))[2:])
    given = config.flat()
    theirs = [opt for opt in peer_options("timm") if opt.why.startswith("DeiT's default")]
    assert len(theirs) > 12
    for opt in theirs:
        if opt.name not in UNUSED:
            here = option_here(opt)
            assert (given[here.name] or None) == (opt.default or None), opt.name
    assert given["opt"] == "sgd" and given["lr"] == 2 * 0.1
