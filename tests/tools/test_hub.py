"""timm's hub form: what timm and transformers alone make of it, the model card, the upload."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from hub_server import running_hub
from PIL import Image
from torch import nn

import models
from architectures.variant import Variant
from augmentation.preprocessing import Preprocessing
from checkpointing.files import load_checkpoint, save_checkpoint
from errors import UserError
from inference import load_for_inference
from loggers import read_log
from tools import export
from tools.hub.card import Run, recipe_of
from tools.hub.folder import opened, writer
from tools.hub.form import hub_form

NAMES = ["amber", "blue", "crimson"]
SMALL = {"img_size": 32, "depth": 1}
NANO = {"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4}
# Our model and what it is built with; timm's name and arguments for it, besides the image size.
EQUAL = (
    ("deit_nano_patch4_32", {"img_size": 16}, "deit_tiny_patch16_224", NANO),
    ("deit_tiny_patch4_32", SMALL, "deit_tiny_patch16_224", {"patch_size": 4, "depth": 1}),
    ("deit_small_patch16_224", SMALL, "deit_small_patch16_224", {"depth": 1}),
    ("deit_base_distilled_patch16_384", SMALL, "deit_base_distilled_patch16_384", {"depth": 1}),
    ("cait_XXS24_224", SMALL, "cait_xxs24_224", {"depth": 1}),
    ("cait_S24", SMALL, "cait_s24_384", {"depth": 1}),
    ("deit_small_patch16_LS", SMALL, "deit3_small_patch16_224", {"depth": 1}),
    (
        *("deit_tiny_patch16_LS", SMALL, "deit3_small_patch16_224"),
        {"depth": 1, "embed_dim": 192, "num_heads": 3},
    ),
    (
        *("deit_small_patch16_36", SMALL, "deit3_small_patch16_224"),
        {"depth": 1, "init_values": 0.0},
    ),
    (
        *("deit_small_patch16_18x2_LS", SMALL, "vit_small_patch16_18x2_224"),
        {"depth": 1, "no_embed_class": True, "init_values": 1e-6},
    ),
    (
        *("deit_small_patch16_18x2", SMALL, "vit_small_patch16_18x2_224"),
        {"depth": 1, "no_embed_class": True, "init_values": 0.0},
    ),
    ("resmlp_12", {"img_size": 32}, "resmlp_12_224", {}),
)


def filled(name: str, **options) -> nn.Module:
    """A model in which every weight matters, LayerScale too."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.3, 0.3)
            else:
                parameter.normal_(0, 0.5 if parameter.ndim == 3 else parameter[0].numel() ** -0.5)
    return model


def write_checkpoint(folder, name: str, size: int, **preprocessing):
    """A checkpoint of ``filled(name)``."""
    images = Preprocessing(size, 0.9, "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "squash")
    options = {"img_size": size} if name.startswith("deit_") else {}
    content = {
        "model": filled(name, **options).state_dict(),
        "config": {"model": name, "data_set": "IMNET"},
        "class_names": NAMES,
        "preprocessing": images.to_dict() | preprocessing,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "best.pth", content)
    return folder / "best.pth"


@pytest.mark.parametrize(("name", "options", "architecture", "arguments"), EQUAL)
def test_models_are_written_as_timms_own(name, options, architecture, arguments, tmp_path):
    model = filled(name, **options)
    x = torch.randn(4, 3, options["img_size"], options["img_size"])
    form = hub_form(model, x)
    arguments = arguments | {"img_size": [options["img_size"]] * 2}
    assert (form.architecture, form.model_args, form.needs) == (architecture, arguments, "")
    assert type(form.model).__module__.startswith("timm.")
    content = {
        "config": {"model": name},
        "class_names": NAMES,
        "preprocessing": Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3).to_dict(),
    }
    writer(Run("x", content, None, None))(model, x, tmp_path / "x.hub", {})
    again = opened(tmp_path / "x.hub")
    assert type(again).__module__.startswith("timm.")
    with torch.no_grad():
        wanted = model(x)
        assert wanted.std() > 1e-2
        torch.testing.assert_close(again(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18_cifar", "simple_cnn", "modern_lenet"])
def test_what_timm_does_not_have_needs_this_project(name):
    form = hub_form(filled(name), torch.randn(2, 3, 32, 32))
    assert (form.architecture, form.model_args, form.needs) == (name, {}, "models")


@pytest.mark.parametrize(
    ("name", "variant", "reason"),
    [
        ("resnet10t", Variant(bn_eps=0.1), "another --bn-eps"),
        ("torchvision/resnet18", Variant(), "torchvision's"),
    ],
)
def test_what_the_form_cannot_hold_is_refused(name, variant, reason):
    model = models.build_model(name, 3, input_size=32, variant=variant)
    with pytest.raises(UserError, match=f"{reason}.*: export it as onnx or safetensors"):
        hub_form(model, torch.zeros(2, 3, 32, 32))


def test_a_model_with_the_tensors_of_deit_and_another_activation_is_not_taken_for_it():
    model = filled("deit_nano_patch4_32", img_size=16)
    model.blocks[0].mlp.act = nn.ReLU()
    form = hub_form(model, torch.randn(2, 3, 16, 16))
    assert form.architecture == "deit_nano_patch4_32" and form.needs == "models"


ALONE = """
import json, sys, timm, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder, image, out = sys.argv[1:]
image = Image.open(image).convert("RGB")
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
data = timm.data.resolve_model_data_config(model)
x = timm.data.create_transform(**data, is_training=False)(image)[None]
processor = AutoImageProcessor.from_pretrained(folder)
other = AutoModelForImageClassification.from_pretrained(folder).eval()
y = processor(image, return_tensors="pt")["pixel_values"]
assert not any(name in sys.modules for name in ("models", "architectures", "inference"))
with torch.no_grad():
    found = {"x": x, "y": y, "timm": model(x), "transformers": other(y).logits}
found["names"] = [other.config.id2label[i] for i in range(3)]
torch.save(found, out)
"""


def test_timm_and_transformers_alone_give_the_same_logits(tmp_path, images):
    path = write_checkpoint(tmp_path, "deit_nano_distilled_patch4_32", 36)
    assert export.main([str(path), "--format", "hub"]) == 0
    image = images / "val/blue/0.png"
    command = [sys.executable, "-c", ALONE, str(tmp_path / "export/best.hub"), str(image)]
    subprocess.run([*command, str(tmp_path / "out.pt")], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "out.pt")
    model, transform, names = load_for_inference(path)
    with Image.open(image) as opened_image:
        x = transform(opened_image.convert("RGB"))[None]
    torch.testing.assert_close(found["x"], x, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["y"], x, atol=1e-5, rtol=0)
    with torch.no_grad():
        wanted = model(x)
    assert wanted.std() > 1e-2
    torch.testing.assert_close(found["timm"], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["transformers"], wanted, atol=1e-4, rtol=1e-4)
    assert found["names"] == names == NAMES


def test_this_project_reads_what_it_wrote(tmp_path):
    path = write_checkpoint(tmp_path, "deit_nano_patch4_32", 36)
    assert export.main([str(path), "--format", "hub"]) == 0
    model, transform, _ = load_for_inference(path)
    again = load_for_inference(tmp_path / "export/best.hub")
    image = Image.effect_noise((70, 60), 60).convert("RGB")
    x = transform(image)
    assert torch.equal(again.transform(image), x)
    with torch.no_grad():
        torch.testing.assert_close(again.model(x[None]), model(x[None]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("background", ["navy", "drop", None])
def test_the_background_goes_there_and_back(background, tmp_path):
    """timm has no field for it, and no trouble with what is there instead."""
    known = {} if background is None else {"background": background}
    path = write_checkpoint(tmp_path, "simple_cnn", 32, **known)
    if background is None:
        content = load_checkpoint(path)
        del content["preprocessing"]["background"]
        save_checkpoint(path, content)
    assert export.main([str(path), "--format", "hub"]) == 0
    folder = tmp_path / "export/best.hub"
    image = Image.effect_noise((70, 60), 60).convert("RGB")
    image.putalpha(Image.linear_gradient("L").resize((70, 60)))
    x = load_for_inference(path).transform(image)
    assert torch.equal(load_for_inference(folder).transform(image), x)
    config = json.loads((folder / "config.json").read_text())
    assert config["preprocessing"]["background"] == (background or "drop")
    steps = {step["step"]: step for step in config["preprocessing"]["steps"]}
    wanted = [0, 0, 128] if background == "navy" else None
    assert steps["decode"]["background"] == wanted
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 3


def test_small_inputs_are_cropped_alike(tmp_path):
    path = write_checkpoint(tmp_path, "simple_cnn", 32, crop_ratio=0.5, crop_mode="center")
    assert export.main([str(path), "--format", "hub"]) == 0
    config = json.loads((tmp_path / "export/best.hub/config.json").read_text())
    data = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    transform = timm.data.create_transform(**data, is_training=False)
    image = Image.effect_noise((70, 60), 60).convert("RGB")
    assert torch.equal(transform(image), load_for_inference(path).transform(image))


# --- the model card -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(checkpoint, draw_curves, tmp_path_factory):
    """The newest checkpoint of a run, with its curves."""
    folder = tmp_path_factory.mktemp("home") / "pets"
    folder.mkdir()
    draw_curves(read_log(checkpoint.parent / "log.txt"), folder / "curves.png")
    return shutil.copy(checkpoint, folder / "best.pth")


@pytest.fixture(scope="module")
def card(run):
    """(front matter, text, folder) of its model card."""
    argv = ["--format", "hub", "--license", "apache-2.0", "--num-workers", "0"]
    assert export.main([str(run), *argv]) == 0
    folder = run.parent / "export" / "best.hub"
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body, folder


def test_the_card_tells_of_the_run(card, run, images):
    front, text, folder = card
    assert (
        text.startswith("# pets\n")
        and front["license"] == "apache-2.0"
        and front["library_name"] == "timm"
    )
    assert front["pipeline_tag"] == "image-classification"
    content = load_checkpoint(run)
    for name, value in content["metrics"].items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        assert f"| {name} | {shown} |" in text
    assert "amber, blue, crimson" in text and images.name in text
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert recipe["model"] == content["config"]["model"]
    assert recipe["batch_size"] == content["config"]["batch_size"]
    assert "opt" not in recipe and "device" not in recipe and "output_dir" not in recipe
    # Where the run lay is nobody's business.
    assert str(images.parent) not in text and str(run.parent.parent) not in text
    curves = (folder / "curves.png").read_bytes()
    assert curves == (run.parent / "curves.png").read_bytes() and "(curves.png)" in text


def test_the_cards_code_works(card, run):
    _, text, folder = card
    x = Image.effect_noise((40, 30), 60).convert("RGB")
    model, transform, _ = load_for_inference(run)
    wanted = model(transform(x)[None])
    codes = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(codes) == 3
    for code in codes:
        names = {"image": x}
        exec(code.replace("FOLDER", str(folder)), names)
        torch.testing.assert_close(names["logits"], wanted, atol=1e-4, rtol=1e-4)


def test_without_a_license_none_is_claimed_and_needs_are_said(tmp_path, capsys):
    path = write_checkpoint(tmp_path, "simple_cnn", 32)
    assert export.main([str(path), "--format", "hub"]) == 0
    assert "timm has no simple_cnn" in capsys.readouterr().out
    text = (tmp_path / "export/best.hub/README.md").read_text()
    assert "License: none is stated" in text
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    assert "timm has no such architecture: `import models`" in text
    assert text.count("import models  # registers simple_cnn") == 2


def test_a_recipe_holds_no_folders_of_the_machine():
    options = {"lr": 0.01, "opt": "adamw", "finetune": "/home/me/deit.pth", "device": "cpu"}
    options |= {"data_set": "hfds/beans", "tensorboard": False, "of_a_plugin": 3}
    options["model"] = "local-dir:/home/me/tiny"
    found = {"lr": 0.01, "finetune": "deit.pth", "data_set": "hfds/beans", "of_a_plugin": 3}
    found["model"] = "tiny"
    assert recipe_of(options) == found


# --- upload ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path / "cache") as server:
        yield server


def test_a_pushed_model_is_read_from_the_hub(hub, tmp_path, capsys):
    path = write_checkpoint(tmp_path / "run", "deit_nano_patch4_32", 16)
    argv = [str(path), "--format", "hub", "--push", "me/pets", "--private"]
    assert export.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"pushed: {hub.address}/me/pets"
    assert hub.private == {"me/pets"}
    folder = tmp_path / "run/export/best.hub"
    assert hub.repositories["me/pets"] == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert 'timm.create_model("hf-hub:me/pets"' in (folder / "README.md").read_text()
    model, again = load_for_inference(path).model, load_for_inference("hf-hub:me/pets")
    x = torch.randn(2, 3, 16, 16)
    assert again.class_names == NAMES
    torch.testing.assert_close(again.model(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--format", "onnx", "--push", "me/pets"], "--push: is for --format hub"),
        (["--format", "onnx", "--license", "mit"], "--license: is for --format hub"),
        (["--format", "hub", "--private"], "--private: is for --push"),
        (["--format", "hub", "--push", "a b/c"], "expected OWNER/NAME"),
        (["--format", "hub", "--push", "pets"], "--push: 'pets' names no owner"),
        (["--format", "hub", "--push", "others/pets"], "others/pets is refused (You don't have"),
    ],
)
def test_pushes_that_are_refused_say_so(hub, tmp_path, capsys, argv, message):
    path = write_checkpoint(tmp_path / "run", "simple_cnn", 32)
    assert export.main([str(path), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not hub.repositories


def test_without_a_token_or_a_hub_a_push_says_so(hub, tmp_path, capsys, monkeypatch):
    path = write_checkpoint(tmp_path / "run", "simple_cnn", 32)
    argv = [str(path), "--format", "hub", "--push", "me/pets"]
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert export.main(argv) == 2
    assert "no token is known: hf auth login, or set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert export.main(argv) == 2
    assert "me/pets is refused (Invalid credentials" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert export.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "me/pets can't be reached" in error and "hf upload me/pets FOLDER" in error
