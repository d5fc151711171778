"""Trained models loaded again: from checkpoints, from what is in memory, and what is refused."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import inference
import utils
from augmentation.preprocessing import Preprocessing
from augmentation.transforms import EvalTransform
from checkpointing.digest import save_safetensors
from checkpointing.files import save_checkpoint
from errors import CheckpointError
from models import build_model
from pipeline.decoding import BadImageError, decode
from tools import predict

NAMES = ["amber", "blue", "crimson"]
PREPROCESSING = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def content() -> dict:
    """What a training checkpoint holds for a user of the model; the average differs."""
    weights = build_model("deit_nano_patch4_32", 3, input_size=32).state_dict()
    return {
        "model": weights,
        "model_ema": {name: 0.5 * value for name, value in weights.items()},
        "config": {"model": "deit_nano_patch4_32"},
        "class_names": NAMES,
        "preprocessing": PREPROCESSING.to_dict(),
    }


@pytest.fixture
def image() -> Image.Image:
    return Image.effect_noise((40, 36), 60).convert("RGB")


def outputs(classifier: inference.Classifier, image: Image.Image) -> torch.Tensor:
    return classifier.model(classifier.transform(image)[None])


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_gives_its_model(content, image, tmp_path, ema):
    save_checkpoint(tmp_path / "best.pth", content)
    classifier = inference.load_for_inference(tmp_path / "best.pth", ema=ema)
    assert classifier.class_names == NAMES
    assert not classifier.model.training
    assert classifier.transform(image).shape == (3, 32, 32)
    model = build_model("deit_nano_patch4_32", 3, input_size=32).eval()
    model.load_state_dict(content["model_ema" if ema else "model"])
    x = classifier.transform(image)[None]
    assert torch.equal(classifier.model(x), model(x))


def test_safetensors_carry_what_describes_them(content, image, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(content["model"], path, inference.metadata_of(content))
    again = inference.load_for_inference(path)
    assert again.class_names == NAMES
    expected = outputs(inference.from_content(content), image)
    assert torch.equal(outputs(again, image), expected)
    save_file(content["model"], path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* holds no config"):
        inference.load_for_inference(path)


def test_metadata_is_read_back(content):
    read = inference.read_metadata(inference.metadata_of(content))
    assert read["config"] == {"model": "deit_nano_patch4_32"}
    assert read["class_names"] == NAMES
    assert Preprocessing.from_dict(read["preprocessing"]) == PREPROCESSING
    for foreign in ({}, {"config": "{", "class_names": "[]", "preprocessing": "{}"}):
        with pytest.raises(CheckpointError, match="doesn't carry class names"):
            inference.read_metadata(foreign)


def test_another_size_interpolates_the_position_embedding(content, image):
    larger = Preprocessing(48, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3)
    classifier = inference.from_content(content, preprocessing=larger)
    assert classifier.model.pos_embed.shape[1] == 1 + 12 * 12
    assert torch.equal(classifier.model.head.weight, content["model"]["head.weight"])
    assert outputs(classifier, image).shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "holds no config"),
        ({"model_ema": None}, "no moving average"),
        ({"class_names": [*NAMES, "green"]}, "don't fit the model deit_nano_patch4_32"),
    ],
)
def test_what_cannot_be_used_is_refused(content, tmp_path, change, message):
    changed = copy.copy(content) | change
    if changed["config"] is None:
        del changed["config"]
    save_checkpoint(tmp_path / "x.pth", changed)
    with pytest.raises(CheckpointError, match=rf"x\.pth: .*{message}"):
        inference.load_for_inference(tmp_path / "x.pth", ema="model_ema" in change)


def test_an_onnx_file_has_one_set_of_weights(tmp_path):
    with pytest.raises(CheckpointError, match="leave --ema out"):
        inference.load_for_inference(tmp_path / "x.onnx", ema=True)


# --- images ---------------------------------------------------------------------------------------


def files_of_all_kinds(folder) -> list[Path]:
    """Transparent, grey, deep, palette, print and turned images, with fine detail."""
    noise = Image.effect_noise((40, 36), 90)
    rgb = Image.merge("RGB", (noise, noise.rotate(90).resize((40, 36)), noise.rotate(180)))
    rgba = rgb.copy()
    rgba.putalpha(Image.linear_gradient("L").resize((40, 36)))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray((np.asarray(noise, dtype=np.uint16) + 1) * 200)
    images = {
        "rgba.png": (rgba, {}),
        "la.png": (rgba.convert("LA"), {}),
        "l.png": (noise, {}),
        "one.png": (noise.convert("1"), {}),
        "p.png": (rgb.quantize(16), {}),
        "p-transparent.png": (rgb.quantize(16), {"transparency": bytes(range(0, 256, 16))}),
        "p.gif": (rgb.quantize(16), {"transparency": 3}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "deep.png": (deep, {}),
        "float.tif": (noise.convert("F"), {}),
        "turned.jpg": (rgb, {"exif": turned}),
        "turned.png": (rgba, {"exif": turned}),
        "turned.tif": (rgb, {"exif": turned}),
        "rgba.webp": (rgba, {"lossless": True}),
    }
    for name, (image, options) in images.items():
        image.save(folder / name, **options)
    return [folder / name for name in images]


def test_the_transform_takes_whatever_holds_an_image(content, tmp_path, capsys):
    """And what it gives is what the command line predicts from."""
    save_checkpoint(tmp_path / "best.pth", content)
    classifier = inference.load_for_inference(tmp_path / "best.pth")
    paths = files_of_all_kinds(tmp_path)
    assert predict.main([str(tmp_path / "best.pth"), *map(str, paths), "--format", "json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    for path, answer in zip(paths, answers, strict=True):
        tensor = classifier.transform(path)
        # As in the evaluation of training.
        expected = EvalTransform(PREPROCESSING).apply(decode(path), 0, 0)
        assert torch.equal(tensor, expected), path.name
        assert torch.equal(classifier.transform.apply(decode(path), 0, 0), expected)
        with Image.open(path) as image, path.open("rb") as file:
            for source in (str(path), path.read_bytes(), file, image):
                assert torch.equal(classifier.transform(source), tensor), path.name
        with torch.no_grad():
            shares = classifier.model(tensor[None]).softmax(1)[0].tolist()
        given = {p["class"]: p["confidence"] for p in answer["predictions"]}
        assert [given[name] for name in NAMES] == pytest.approx(shares, abs=1e-5)
    array = np.asarray(Image.open(tmp_path / "l.png"))
    assert torch.equal(classifier.transform(array), classifier.transform(tmp_path / "l.png"))
    with pytest.raises(BadImageError, match="No such file"):
        classifier.transform(tmp_path / "none.png")


def test_the_background_is_the_checkpoints(content, tmp_path):
    [path, *_] = files_of_all_kinds(tmp_path)
    tensors = []
    for background in ("white", "navy", "drop", None):
        content["preprocessing"] = PREPROCESSING.to_dict() | {"background": background}
        if background is None:  # of a checkpoint from before there was a choice
            del content["preprocessing"]["background"]
        tensors.append(inference.from_content(content).transform(path))
    white, navy, drop, older = tensors
    assert torch.equal(older, drop)
    with Image.open(path) as image:
        assert torch.equal(drop, EvalTransform(PREPROCESSING)(image.convert("RGB")))
    assert not torch.equal(white, navy) and not torch.equal(white, drop)


# --- published models -----------------------------------------------------------------------------


def published(folder, num_classes: int, cfg: dict, **config) -> torch.nn.Module:
    """A model of timm's in timm's hub form."""
    name = "test_efficientnet"
    model = timm.create_model(name, num_classes=num_classes).eval()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config |= {"architecture": name, "num_classes": num_classes, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return model


CFG = {
    "input_size": [3, 48, 48],
    "crop_pct": 0.75,
    "crop_mode": "squash",
    "interpolation": "bilinear",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.3],
}


def test_a_published_model_comes_with_its_own_data_configuration(image, tmp_path):
    model = published(tmp_path / "model", 3, CFG, label_names=NAMES)
    classifier = inference.load_for_inference(tmp_path / "model")
    assert classifier.class_names == NAMES and not classifier.model.training
    # As timm itself prepares images for it.
    data = timm.data.resolve_data_config(pretrained_cfg=CFG)
    expected = timm.data.create_transform(**data, is_training=False)(image)
    torch.testing.assert_close(classifier.transform(image), expected, atol=1e-6, rtol=0)
    assert torch.equal(classifier.model(expected[None]), model(expected[None]))
    with pytest.raises(CheckpointError, match="no moving average"):
        inference.load_for_inference(tmp_path / "model", ema=True)


@pytest.mark.parametrize(
    ("count", "given", "names"),
    [
        (3, {}, ["class 0", "class 1", "class 2"]),
        (3, {"label_names": {"0": "a", "2": "c"}}, ["a", "class 1", "c"]),
        (1000, {}, ["tench", "goldfish", "great white shark"]),
        (1000, {"label_names": [f"n{i}" for i in range(1000)]}, ["n0", "n1", "n2"]),
    ],
)
def test_class_names_of_published_models(tmp_path, count, given, names):
    published(tmp_path / "model", count, CFG, **given)
    found = inference.load_for_inference(tmp_path / "model").class_names
    assert len(found) == len(set(found)) == count and found[:3] == names


def test_published_models_that_cannot_be_used_are_refused(tmp_path):
    published(tmp_path / "model", 3, CFG, label_names=["a", "b"])
    message = rf"{tmp_path}/model.*has 3 classes and 2 label_names"
    with pytest.raises(CheckpointError, match=message):
        inference.load_for_inference(tmp_path / "model")


def test_published_models_of_images_that_are_not_square(tmp_path, image):
    published(tmp_path / "model", 3, CFG | {"input_size": [3, 48, 32]})
    model, transform, _ = inference.load_for_inference(tmp_path / "model")
    assert transform(image).shape == (3, 48, 32)
    assert model(transform(image)[None]).shape == (1, 3)


def test_a_checkpoint_of_a_published_architecture_needs_no_published_weights(tmp_path, image):
    model = published(tmp_path / "model", 3, CFG)
    weights = {name: 0.5 * x for name, x in model.state_dict().items()}
    content = {
        "model": weights,
        "config": {"model": f"local-dir:{tmp_path}/model"},
        "class_names": NAMES,
        "preprocessing": PREPROCESSING.to_dict(),
    }
    save_checkpoint(tmp_path / "best.pth", content)
    (tmp_path / "model" / "model.safetensors").unlink()
    classifier = inference.load_for_inference(tmp_path / "best.pth")
    model.load_state_dict(weights)
    x = classifier.transform(image)[None]
    assert torch.equal(classifier.model(x), model(x))
    (tmp_path / "model" / "config.json").unlink()
    message = "weights are here, but the architecture is read from the config.json of local-dir"
    with pytest.raises(CheckpointError, match=message):
        inference.load_for_inference(tmp_path / "best.pth")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="without a checkpoint or config.json: name a file"):
        inference.load_for_inference(tmp_path)


# --- what doesn't fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"model": "vit_base_patch16_224"}}, "cls_token is 1 × 1 × 128, not 1 × 1 × 7"),
        ({"class_names": list(map(str, range(10**6)))}, "head.weight is 3 × 128, not 1000000 × "),
        ({"preprocessing": PREPROCESSING.to_dict() | {"input_size": 8192}}, "pos_embed is 1 × 65 "),
        ({"class_names": []}, "the weights don't fit the model"),
        ({"preprocessing": PREPROCESSING.to_dict() | {"blur": 3}}, "its preprocessing has blur"),
        ({"preprocessing": [1]}, "its preprocessing is list"),
        ({"config": "deit"}, "its config is str 'deit'"),
    ],
)
def test_what_does_not_fit_costs_no_memory(content, change, message):
    """The names in a file may ask for a model of gigabytes."""
    before = utils.peak_memory(torch.device("cpu"))
    with pytest.raises(CheckpointError, match=message) as caught:
        inference.from_content(content | change)
    assert "\n" not in str(caught.value)
    assert utils.peak_memory(torch.device("cpu")) - before < 200 << 20


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_of_other_kinds_are_refused(content, dtype):
    content["model"]["head.bias"] = content["model"]["head.bias"].to(dtype)
    with pytest.raises(CheckpointError, match="head.bias is of .*, not of float32"):
        inference.from_content(content)


@pytest.mark.parametrize("config", [{"label_names": 7}, {"label_names": "abc"}])
def test_odd_label_names_of_a_folder(tmp_path, config):
    published(tmp_path / "model", 3, CFG, **config)
    with pytest.raises(CheckpointError, match=r"the label_names in its config\.json are a "):
        inference.load_for_inference(tmp_path / "model")


def test_a_damaged_folder_is_found(tmp_path):
    model = published(tmp_path / "model", 3, CFG)
    path = tmp_path / "model" / "model.safetensors"
    save_safetensors(path, model.state_dict(), {"format": "pt"})
    inference.load_for_inference(tmp_path / "model")
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(CheckpointError, match="not those that its checksum is of"):
        inference.load_for_inference(tmp_path / "model")


# --- ONNX -----------------------------------------------------------------------------------------

onnx_helper = pytest.importorskip("onnx").helper
FLOAT, DOUBLE, UINT8, STRING = 1, 11, 2, 8
WEIGHTS = np.random.default_rng(0).standard_normal((48, 3)).astype(np.float32)
METADATA = {
    "config": json.dumps({"model": "deit_nano_patch4_32"}),
    "class_names": json.dumps(NAMES),
    "preprocessing": json.dumps(
        Preprocessing(4, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3).to_dict()
    ),
}


def onnx_file(
    path,
    *,
    images=("n", 3, 4, 4),
    logits=("n", 3),
    types=(FLOAT, FLOAT),
    outputs=1,
    inner="MatMul",
    metadata=METADATA,
):
    """A linear classifier of 4 × 4 pixels; "Flatten" forgets to classify."""
    node, info = onnx_helper.make_node, onnx_helper.make_tensor_value_info
    nodes = [
        node("Cast", ["x"], ["c"], to=FLOAT),
        node("Flatten", ["c"], ["f"]),
        node("MatMul", ["f", "w"], ["z"]),
        # By way of a shape that is known when it runs.
        node("Shape", ["f" if inner == "Flatten" else "z"], ["s"]),
        node("Reshape", ["f" if inner == "Flatten" else "z", "s"], ["l"]),
        node("Cast", ["l"], ["y0"], to=types[1]),
        *(node("Identity", ["y0"], [f"y{i}"]) for i in range(1, outputs)),
    ]
    weights = onnx_helper.make_tensor("w", FLOAT, WEIGHTS.shape, WEIGHTS.flatten())
    given = [info(f"y{i}", types[1], logits) for i in range(outputs)]
    graph = onnx_helper.make_graph(nodes, "g", [info("x", types[0], images)], given, [weights])
    model = onnx_helper.make_model(
        graph, opset_imports=[onnx_helper.make_opsetid("", 17)], ir_version=9
    )
    for name, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"images": (1, 3, 4, 4), "logits": (1, 3)},
        {"images": (4, 3, 4, 4), "logits": (4, 3)},
        {"images": ("n", 3, "h", "w"), "logits": None},
        {"images": None},
    ],
    ids=["any number", "one", "four", "any size", "unknown"],
)
def test_onnx_files_of_any_number_of_images(tmp_path, form):
    """Also of a fixed one, which doesn't divide how many there are."""
    model = inference.load_for_inference(onnx_file(tmp_path / "x.onnx", **form)).model
    images = torch.randn(6, 3, 4, 4)
    expected = images.flatten(1).numpy() @ WEIGHTS
    np.testing.assert_allclose(model(images).numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"images": ("n", 3, 16)}, r"input is tensor\(float\) of N × 3 × 16"),
        ({"images": ("n", 48)}, r"input is tensor\(float\) of N × 48"),
        ({"types": (UINT8, FLOAT)}, r"input is tensor\(uint8\)"),
        ({"types": (FLOAT, DOUBLE)}, r"output is tensor\(double\)"),
        ({"types": (FLOAT, STRING)}, r"output is tensor\(string\)"),
        ({"outputs": 2}, "has 2 outputs"),
        ({"metadata": {}}, "doesn't carry class names"),
        ({"metadata": METADATA | {"config": "null"}}, "doesn't carry class names"),
        ({"metadata": METADATA | {"config": "[" * 10**5}}, "doesn't carry class names"),
        ({"metadata": METADATA | {"class_names": "9" * 10**4}}, "doesn't carry class names"),
        ({"metadata": METADATA | {"class_names": '{"a": 1}'}}, "its class_names is a dict"),
        ({"metadata": METADATA | {"class_names": '["a"]'}}, r"tensor\(float\) of N × 1: export"),
        (
            {
                "metadata": METADATA
                | {"preprocessing": METADATA["preprocessing"].replace(": 4,", ": 8,")}
            },
            "of N × 3 × 8 × 8: export it",
        ),
    ],
)
def test_onnx_files_of_another_form_are_refused(tmp_path, form, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        inference.load_for_inference(onnx_file(tmp_path / "x.onnx", **form))
    assert "\n" not in str(caught.value)


def test_onnx_answers_of_another_shape(tmp_path):
    path = onnx_file(tmp_path / "x.onnx", logits=None, inner="Flatten")
    model = inference.load_for_inference(path).model
    with pytest.raises(CheckpointError, match="answers 2 images of 3 classes with 2 × 48 numbers"):
        model(torch.zeros(2, 3, 4, 4))
    with pytest.raises(CheckpointError, match="the ONNX model can't answer"):
        model(torch.zeros(2, 3, 5, 5))
