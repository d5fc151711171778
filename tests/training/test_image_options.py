"""What is left open about the images comes from the weights, against timm's own resolution."""

import json
import re

import pytest
import timm
import torch
import yaml
from runs import ROOT, train
from safetensors.torch import save_file
from tiny_images import image_folder

import main
from architectures.factory import published_cfg
from augmentation.preprocessing import Preprocessing
from checkpointing.files import save_checkpoint
from checkpointing.folder import load_newest
from config import COMMAND_LINE, DEFAULT, MODEL, load
from errors import CheckpointError
from pipeline.decoding import decode
from training.image_options import (
    asked_preprocessing,
    evaluation_crop_ratio,
    with_options_of_weights,
)

OPTIONS = ("input_size", "eval_crop_ratio", "crop_mode", "interpolation", "mean", "std")
TIMMS = (0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)
# Models of all kinds of configuration: sizes, crops, filters, crop modes, normalisations.
NAMES = (
    "deit_tiny",
    "deit_small_patch16_224",
    "deit_base_patch16_384",
    "deit3_small_patch16_224",
    "deit3_base_patch16_384.fb_in22k_ft_in1k",
    "cait_XXS24_224",
    "cait_S24",
    "cait_m48_448",
    "resnet50",
    "resnet50.tv_in1k",
    "resnet50.a1_in1k",
    "resnext50_32x4d",
    "seresnext50_32x4d",
    "regnety_160",
    "convnext_tiny",
    "convnext_base.clip_laion2b_augreg_ft_in12k_in1k_384",
    "inception_v3",
    "tf_efficientnet_b0",
    "tf_efficientnet_b7",
    "efficientnet_b2",
    "mobilenetv3_large_100",
    "vit_base_patch16_224",
    "vit_base_patch16_clip_224.openai",
    "swin_tiny_patch4_window7_224",
    "beit_base_patch16_224",
    "eva02_base_patch14_448",
    "volo_d4_448",
)


def of(config, *names):
    flat = config.flat()
    return [flat[name] for name in names]


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_have_timms_data_configuration(name):
    config = with_options_of_weights(load(["--model", name, "--pretrained"]))
    cfg = published_cfg(name)
    wanted = timm.data.resolve_data_config(pretrained_cfg=cfg)
    assert wanted["input_size"] == (3, config.model.input_size, config.model.input_size)
    assert config.data.eval_crop_ratio == wanted["crop_pct"]
    assert config.data.crop_mode == wanted["crop_mode"]
    assert config.data.interpolation == wanted["interpolation"]
    assert (config.data.mean, config.data.std) == (wanted["mean"], wanted["std"])
    assert {config.origin[option] for option in OPTIONS} == {MODEL}


def test_every_published_model_is_resolved():
    others = set()
    for name in timm.list_models(pretrained=True):
        found = Preprocessing.of_model(published_cfg(name))
        wanted = timm.data.resolve_data_config(
            pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()
        )
        assert (found.size, found.crop_ratio) == (wanted["input_size"][1:], wanted["crop_pct"])
        assert (found.interpolation, found.crop_mode) == (
            wanted["interpolation"],
            wanted["crop_mode"],
        )
        assert (found.mean, found.std) == (wanted["mean"], wanted["std"])
        if found.size[0] != found.size[1]:
            others.add(found.size)
    assert others == {(1024, 768)}  # no square


def test_what_is_stated_stays(tmp_path):
    (tmp_path / "r.yaml").write_text("pretrained: true\neval_crop_ratio: 0.8\n")
    argv = ["--config", str(tmp_path / "r.yaml"), "--model", "inception_v3", "--mean", "0.4"]
    config = with_options_of_weights(load([*argv, "--crop-mode", "squash"]))
    assert of(config, *OPTIONS) == [299, 0.8, "squash", "bicubic", [0.4], [0.5] * 3]
    assert config.origin["mean"] == COMMAND_LINE
    assert config.origin["eval_crop_ratio"] == str(tmp_path / "r.yaml")
    assert config.origin["interpolation"] == config.origin["std"] == MODEL


def test_a_value_stated_that_is_the_default_stays():
    config = with_options_of_weights(
        load(["--model", "inception_v3", "--pretrained", "--input-size", "224"])
    )
    assert config.model.input_size == 224


def test_training_from_scratch_keeps_the_defaults():
    config = load(["--model", "inception_v3"])
    assert with_options_of_weights(config) is config
    assert set(config.origin.values()) <= {DEFAULT, COMMAND_LINE}


def test_recipes_with_weights_keep_what_they_state():
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        config = load(["--config", str(recipe)])
        if not config.model.pretrained:
            continue
        found = with_options_of_weights(config)
        changed = {name for name in OPTIONS if config.origin[name] != DEFAULT}
        assert of(found, *changed) == of(config, *changed)


def test_print_config_shows_the_origin(capsys):
    assert main.main(["--model", "inception_v3", "--pretrained", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^input_size: 299 +# model$", shown, re.M)
    assert re.search(r"^crop_mode: center +# model$", shown, re.M)
    assert yaml.safe_load(shown)["mean"] == [0.5, 0.5, 0.5]


def test_fine_tuning_a_checkpoint_takes_its_preprocessing(tmp_path):
    trained = Preprocessing(48, 0.9, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "border")
    content = {"model": {"x": torch.zeros(1)}, "preprocessing": trained.to_dict(), "config": {}}
    save_checkpoint(tmp_path / "best.pth", content)
    argv = ["--model", "resnet18", "--finetune", str(tmp_path / "best.pth"), "--std", "0.25"]
    config = with_options_of_weights(load(argv))
    assert of(config, *OPTIONS) == [48, 0.9, "border", "bilinear", [0.1, 0.2, 0.3], [0.25]]


def test_published_file_has_the_configuration_of_its_model(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "weights.pth")
    for argv in (["--finetune"], ["--eval", "--resume"]):
        argv = ["--model", "convnext_tiny", *argv, str(tmp_path / "weights.pth")]
        config = with_options_of_weights(load(argv))
        assert config.data.eval_crop_ratio == published_cfg("convnext_tiny")["crop_pct"] != 0.875


def test_a_run_that_goes_on_has_its_options_in_the_checkpoint(tmp_path):
    """What its options say counts; the file isn't even opened."""
    config = load(["--model", "inception_v3", "--pretrained", "--resume", str(tmp_path / "no.pth")])
    assert with_options_of_weights(config) is config


def test_a_run_that_goes_on_in_its_folder_remembers(tmp_path):
    """Also where the weights it started from are gone."""
    (tmp_path / "config.yaml").write_text("crop_mode: squash\ninput_size: 48\nmean: [0.1]\n")
    argv = ["--model", "resnet18", "--finetune", str(tmp_path / "gone.pth"), "--mean", "0.5"]
    config = with_options_of_weights(load([*argv, "--resume", "auto"]), tmp_path)
    assert of(config, "crop_mode", "input_size", "mean") == ["squash", 48, [0.5]]
    with pytest.raises(CheckpointError, match="does not exist"):
        with_options_of_weights(load(argv), tmp_path)


@pytest.mark.parametrize(
    "options, ratio",
    [
        ((), 0.875),
        (("--input-size", "33"), 0.875),
        (("--input-size", "32"), 1.0),
        (("--input-size", "32", "--eval-crop-ratio", "0.9"), 0.9),
    ],
)
def test_small_images_are_evaluated_whole(options, ratio):
    assert evaluation_crop_ratio(load(options)) == ratio


def test_only_what_is_asked_for_changes_a_checkpoints_preprocessing():
    trained = Preprocessing(48, 0.9, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "border")
    assert asked_preprocessing(load([]), trained) == trained
    config = load(["--input-size", "64", "--interpolation", "lanczos", "--mean", "0.5"])
    assert asked_preprocessing(config, trained) == Preprocessing(
        64, 0.9, "lanczos", (0.5, 0.5, 0.5), (0.4, 0.5, 0.6), "border"
    )


@pytest.mark.parametrize(
    ("saved", "wanted"), [({"background": "navy"}, "navy"), ({}, "drop"), (None, "white")]
)
def test_transparency_is_as_the_weights_know_it(tmp_path, saved, wanted):
    """timm's published weights have no background: white, as everywhere."""
    if saved is None:
        argv = ["--model", "resnet18", "--pretrained"]
    else:
        values = Preprocessing(48, *TIMMS).to_dict()
        del values["background"]
        content = {"model": {"x": torch.zeros(1)}, "preprocessing": values | saved, "config": {}}
        save_checkpoint(tmp_path / "best.pth", content)
        argv = ["--model", "resnet18", "--finetune", str(tmp_path / "best.pth")]
    assert with_options_of_weights(load(argv)).data.background == wanted
    config = load([*argv, "--background", "#010203"])
    assert with_options_of_weights(config).data.background == "#010203"
    trained = Preprocessing(48, *TIMMS, background=wanted)
    assert asked_preprocessing(load([]), trained) == trained
    assert asked_preprocessing(config, trained).background == "#010203"


@pytest.mark.parametrize("saved", ["navy", None])
def test_a_run_goes_on_with_its_background(saved, images, tmp_path):
    """One from before there was a choice with transparency dropped; unless another is asked for."""
    short = ("--model", "simple_cnn", "--no-model-ema", "--no-repeated-aug")
    first = () if saved is None else ("--background", saved)
    assert train(images, tmp_path, *short, *first, "--stop-at-epoch", "1") == 0
    path, content = load_newest(tmp_path)
    assert content["preprocessing"]["background"] == (saved or "white")
    if saved is None:
        del content["preprocessing"]["background"], content["config"]["background"]
        save_checkpoint(path, content)
    for asked, wanted in (((), saved or "drop"), (("--background", "#010203"), "#010203")):
        start = ("--resume", "auto", "--stop-at-epoch", "2" if not asked else "3")
        assert train(images, tmp_path, *short, *asked, *start) == 0
        assert load_newest(tmp_path)[1]["preprocessing"]["background"] == wanted


@pytest.mark.parametrize("how", ["pretrained", "resume"])
def test_published_model_is_evaluated_on_its_own_images(tmp_path, capsys, how):
    """Accuracy and loss of --eval against timm's model and timm's transform."""
    images = image_folder(tmp_path / "images", {"train": 1, "val": 5}, size=(61, 44))
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.manual_seed(0)
    twin = timm.create_model("resnet10t", num_classes=3).eval()
    save_file(twin.state_dict(), folder / "model.safetensors")
    own = {
        "input_size": [3, 40, 40],
        "crop_pct": 0.7,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "mean": [0.2, 0.4, 0.6],
        "std": [0.3, 0.2, 0.5],
    }
    cfg = {"num_classes": 3, "first_conv": "conv1.0", "classifier": "fc", **own}
    config = {"architecture": "resnet10t", "num_classes": 3, "pretrained_cfg": cfg}
    config["label_names"] = sorted(p.name for p in (images / "val").iterdir())
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        "pretrained": ("--pretrained", "--model", f"local-dir:{folder}"),
        "resume": ("--resume", str(folder)),
    }
    argv = ["--eval", *weights[how], "--device", "cpu", "--data-path", str(images)]
    argv += ["--output-dir", str(tmp_path / "out")]
    assert main.main(argv) == 0
    shown = re.search(r"top-1 ([\d.]+) %.*loss ([\d.]+)  \(15 images\)", capsys.readouterr().out)
    assert main.main([*argv, "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["input_size"], printed["eval_crop_ratio"]) == (40, 0.7)

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    right, losses = 0, []
    for label, name in enumerate(config["label_names"]):
        for path in (images / "val" / name).iterdir():
            with torch.no_grad():
                logits = model(transform(decode(path))[None])
            right += int(logits.argmax() == label)
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
    assert float(shown[1]) == pytest.approx(100 * right / 15, abs=1e-3)
    assert float(shown[2]) == pytest.approx(sum(losses) / 15, abs=1e-4)


def test_no_run_goes_on_from_published_weights(tmp_path, capsys):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "resnet10t"}')
    argv = ["--resume", str(folder), "--data-set", "DIGITS", "--output-dir", str(tmp_path / "out")]
    assert main.main([*argv, "--device", "cpu", "--model", "resnet10t"]) == 2
    assert "start from its weights with --model NAME --pretrained" in capsys.readouterr().err
