"""tools.export: every format answers as the model does, and carries what is needed to ask it."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from plain_steps import prepared
from safetensors import safe_open
from torch import nn

import inference
import models
from augmentation.preprocessing import Preprocessing
from cait_models import CaiT
from checkpointing.files import save_checkpoint
from errors import CheckpointError, UserError
from tools import export, predict

METADATA = ("config", "class_names", "preprocessing")
NAMES = ["amber", "blue", "crimson"]
PREPROCESSING = {
    "input_size": 16,
    "crop_ratio": 0.875,
    "interpolation": "bilinear",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
}
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 2}


def tiny(build, **defaults):
    def entry(pretrained=False, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k in ("num_classes", "img_size")}
        return build(**(defaults | kwargs))

    return entry


def small_resnet(num_classes=3, img_size=16):
    return timm.create_model("resnet10t", num_classes=num_classes)


BUILDERS = {
    "tiny_test_deit": tiny(models.VisionTransformer, **SMALL),
    "tiny_test_distilled": tiny(models.DistilledVisionTransformer, **SMALL),
    "tiny_test_cait": tiny(CaiT, **SMALL, init_values=0.5),
    "tiny_test_resnet": tiny(small_resnet),
}
for _name, _entry in BUILDERS.items():
    _entry.__name__ = _name
    _entry.__module__ = "models"
    timm.models.register_model(_entry)

FORMATS = {
    "tiny_test_deit": list(export.SUFFIXES),
    "tiny_test_distilled": [*export.WRITERS, export.HUB],
    "tiny_test_cait": [*export.WRITERS, export.HUB],
    "tiny_test_resnet": [*export.WRITERS, export.HUB, "int8-static"],
}


def write_checkpoint(name, folder, images, preprocessing=PREPROCESSING):
    torch.manual_seed(0)
    model = models.build_model(name, 3, input_size=16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.train()
    for _ in range(5):  # batch-norm statistics
        model(torch.randn(8, 3, 16, 16))
    config = {"model": name, "data_set": "IMNET", "data_path": str(images)}
    content = {"model": model.state_dict(), "config": config, "class_names": NAMES}
    save_checkpoint(folder / "best.pth", content | {"preprocessing": preprocessing})
    return folder / "best.pth"


def run(*argv) -> int:
    return export.main([*map(str, argv), "--num-workers", "0"])


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, images, tmp_path_factory):
    """(checkpoint, name of its model), exported in all its formats."""
    path = write_checkpoint(request.param, tmp_path_factory.mktemp("run"), images)
    assert run(path, "--format", *FORMATS[request.param]) == 0
    return path, request.param


def opened(path, suffix):
    """The model of an exported file and its metadata, with nothing of this project."""
    path = path.parent / "export" / f"best{suffix}"
    if suffix == ".torchscript":
        extra = dict.fromkeys(METADATA, "")
        return torch.jit.load(path, _extra_files=extra), extra
    if suffix == ".pt2":
        extra = dict.fromkeys(METADATA, "")
        return torch.export.load(path, extra_files=extra).module(), extra
    session = onnxruntime.InferenceSession(path)
    extra = {p.key: p.value for p in onnx.load(path).metadata_props}
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]), extra


@pytest.mark.parametrize("suffix", [".onnx", ".torchscript", ".pt2"])
def test_answers_are_the_models_for_any_number_of_images(exported, images, suffix):
    path, _ = exported
    model, transform, _ = inference.load_for_inference(path)
    files = sorted(images.glob("val/*/*.png"))
    batch = torch.stack([transform(Image.open(file)) for file in files])
    other, extra = opened(path, suffix)
    for count in (1, 5, 18):
        with torch.no_grad():
            wanted = model(batch[:count])
            assert wanted.std() > 1e-3
            torch.testing.assert_close(other(batch[:count]), wanted, atol=1e-4, rtol=1e-4)
    read = {k: json.loads(v if isinstance(v, str) else v.decode()) for k, v in extra.items()}
    assert read["class_names"] == NAMES
    # What the checkpoint says of itself, as it was used: all of so small an image.
    assert read["preprocessing"] == Preprocessing.from_dict(PREPROCESSING).exported()
    assert read["preprocessing"]["crop_ratio"] == 1.0


@pytest.mark.parametrize(
    ("side", "known"), [(16, {}), (40, {"background": "white", "crop_mode": "border"})]
)
def test_the_metadata_alone_are_enough_to_ask(side, known, images, tmp_path, capsys):
    """By somebody who has the ONNX file, Pillow and NumPy; the first is of an older checkpoint."""
    preprocessing = {**PREPROCESSING, "input_size": side, "crop_ratio": 0.8, **known}
    path = write_checkpoint("tiny_test_resnet", tmp_path, images, preprocessing)
    transparent = Image.effect_noise((50, 43), 90).convert("RGB")
    transparent.putalpha(Image.linear_gradient("L").resize((50, 43)))
    transparent.save(tmp_path / "transparent.png")
    files = [*sorted(images.glob("val/*/0.png")), tmp_path / "transparent.png"]
    assert run(path, "--format", "onnx", "safetensors", "--output", tmp_path / "out") == 0
    session = onnxruntime.InferenceSession(tmp_path / "out/best.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    with safe_open(tmp_path / "out/best.safetensors", "pt") as file:
        assert file.metadata()["preprocessing"] == metadata["preprocessing"]
    steps = json.loads(metadata["preprocessing"])["steps"]
    capsys.readouterr()
    assert predict.main([*map(str, (path, *files)), "--format", "json", "--device", "cpu"]) == 0
    answers = json.loads(capsys.readouterr().out)
    for file, answer in zip(files, answers, strict=True):
        [logits] = session.run(None, {"images": prepared(file, steps)})[0]
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        given = {p["class"]: p["confidence"] for p in answer["predictions"]}
        assert [given[n] for n in NAMES] == pytest.approx(shares.tolist(), abs=2e-3)


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".hub"])
def test_the_way_in_opens_exported_files(exported, images, suffix):
    path, _ = exported
    model, transform, names = inference.load_for_inference(path)
    other = inference.load_for_inference(path.parent / "export" / f"best{suffix}")
    assert other.class_names == names == NAMES
    with Image.open(images / "val/blue/3.png") as image:
        tensor = transform(image)
        assert torch.equal(other.transform(image), tensor)
    with torch.no_grad():
        torch.testing.assert_close(
            other.model(tensor[None]), model(tensor[None]), atol=1e-4, rtol=1e-4
        )


def test_an_onnx_file_predicts_as_its_checkpoint(exported, images, capsys):
    path, _ = exported
    answers = []
    for file in (path, path.parent / "export" / "best.onnx"):
        capsys.readouterr()
        argv = [str(file), str(images / "val"), "--format", "json", "--device", "cpu"]
        assert predict.main(argv) == 0
        answers.append(json.loads(capsys.readouterr().out))
    for left, right in zip(*answers, strict=True):
        assert left["file"] == right["file"]
        for a, b in zip(left["predictions"], right["predictions"], strict=True):
            assert a["class"] == b["class"] and abs(a["confidence"] - b["confidence"]) < 1e-4


def test_int8_files_hold_bytes_and_nearly_agree(exported, images):
    path, name = exported
    model, transform, names = inference.load_for_inference(path)
    batch = torch.stack([transform(Image.open(f)) for f in sorted(images.glob("val/*/*.png"))])
    for kind in sorted(export.INT8.keys() & FORMATS[name]):
        file = path.parent / "export" / f"best.{kind}.onnx"
        weights = onnx.load(file).graph.initializer
        bytes_ = [w for w in weights if w.data_type == onnx.TensorProto.INT8]
        assert sum(int(np.prod(w.dims)) for w in bytes_) > 500
        other = inference.load_for_inference(file)
        assert other.class_names == names
        with torch.no_grad():
            wanted, given = model(batch), other.model(batch)
        error = (given - wanted).norm() / (wanted - wanted.mean(0)).norm()
        assert 0 < error < 0.35


def test_int8_weights_are_a_quarter(images, tmp_path):
    weights = (tmp_path / "float.onnx", tmp_path / "int8.onnx")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 300), nn.ReLU(), nn.Linear(300, 3))
    batch = torch.randn(4, 3, 16, 16)
    export.to_onnx(model.eval(), batch, weights[0], {})
    export.to_int8_dynamic(weights[0], weights[1], {}, export.Images(batch, None))
    assert weights[1].stat().st_size < 0.3 * weights[0].stat().st_size


def test_the_table_tells_size_and_accuracy(exported, images, capsys):
    path, _ = exported
    capsys.readouterr()
    assert run(path, "--format", "safetensors", "--images", "12") == 0
    header, before, after = capsys.readouterr().out.splitlines()
    assert header.split() == ["format", "MiB", "ms/image", "difference", "top-1", "file"]
    model, transform, _ = inference.load_for_inference(path)
    right = 0
    files = [f for name in NAMES for f in sorted((images / "val" / name).iterdir())]
    with torch.no_grad():
        for i in np.linspace(0, 17, 12).astype(int):
            right += int(model(transform(Image.open(files[i]))[None]).argmax()) == i // 6
    for line in (before, after):
        assert f"{100 * right / 12:.2f} %" in line
        assert " 0.0e+00 " in line


# --- errors ---------------------------------------------------------------------------------------


class Restless(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) + torch.rand(1)


def test_a_file_that_answers_otherwise_is_removed(tmp_path):
    batch = torch.randn(4, 3, 8, 8)
    images = export.Images(batch, None)
    rows = export.export(
        Restless(), {}, tmp_path / "best", ["torchscript"], images, batch.mean((2, 3))
    )
    with pytest.raises(UserError, match="would answer otherwise"):
        list(rows)
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_exported_says_so(tmp_path):
    class Chooser(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    images = torch.randn(4, 3, 8, 8)
    rows = export.export(
        Chooser(), {}, tmp_path / "best", ["program"], export.Images(images, None), images
    )
    with pytest.raises(UserError, match="can't be exported as program"):
        list(rows)


def test_without_its_images_a_model_is_compared_on_noise(images, tmp_path, capsys):
    path = write_checkpoint("tiny_test_deit", tmp_path, tmp_path / "gone")
    assert run(path, "--format", "safetensors") == 0
    assert "note: compared on noise" in capsys.readouterr().out
    assert run(path, "--format", "int8-static") == 2
    assert "needs images" in capsys.readouterr().err
    assert run(path, "--data-path", tmp_path / "gone") == 2
    assert run(tmp_path / "best.onnx") == 2
    assert "an export already" in capsys.readouterr().err


def test_onnx_files_of_others_and_broken_ones_are_refused(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    export.to_onnx(model.eval(), torch.randn(2, 3, 2, 2), tmp_path / "theirs.onnx", {})
    with pytest.raises(CheckpointError, match="theirs.onnx: the file doesn't carry class names"):
        inference.load_for_inference(tmp_path / "theirs.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not ONNX")
    with pytest.raises(CheckpointError, match="broken.onnx can't be read as ONNX"):
        inference.load_for_inference(tmp_path / "broken.onnx")
    with pytest.raises(CheckpointError, match="none.onnx does not exist"):
        inference.load_for_inference(tmp_path / "none.onnx")
    with pytest.raises(CheckpointError, match="leave --ema out"):
        inference.load_for_inference(tmp_path / "theirs.onnx", ema=True)
    (tmp_path / "broken.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="broken.safetensors is a text file"):
        inference.load_for_inference(tmp_path / "broken.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(CheckpointError, match="theirs.safetensors: the checkpoint holds no config"):
        inference.load_for_inference(tmp_path / "theirs.safetensors")
