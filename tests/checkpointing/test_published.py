"""Published models: timm's by name, the hub's, folders in timm's hub form; and what is refused."""

import json

import pytest
import timm
import torch
from hub_server import running_hub
from safetensors.torch import save_file

from checkpointing.published import classes_of, is_published, read_published, short_name
from errors import CheckpointError

NAME = "test_efficientnet"  # timm's, 0.4 M parameters
CFG = {"input_size": [3, 32, 32], "mean": [0.4] * 3, "std": [0.2] * 3, "crop_pct": 0.9}


def hub_files(model, **config) -> dict[str, bytes]:
    """The files of timm's hub form of a model."""
    from safetensors.torch import save

    content = {
        "architecture": NAME,
        "num_classes": 3,
        "pretrained_cfg": CFG | {"num_classes": 3, "classifier": "classifier"},
    } | config
    return {
        "config.json": json.dumps(content).encode(),
        "model.safetensors": save(model.state_dict()),
    }


def write(folder, files) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=3).eval()


def assert_same(weights, model):
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("written", ["{}", "local-dir:{}"])
def test_a_folder_gives_its_weights_and_configuration(model, tmp_path, written):
    folder = write(tmp_path / "model", hub_files(model, label_names=["a", "b", "c"]))
    source = written.format(folder)
    assert is_published(source)
    found = read_published(source)
    assert_same(found.weights, model)
    assert found.name == f"local-dir:{folder}"
    assert list(found.cfg["input_size"]) == [3, 32, 32] and found.cfg["crop_pct"] == 0.9
    assert found.cfg["label_names"] == ["a", "b", "c"]


def test_weights_may_be_pickled_but_run_no_code(model, tmp_path):
    folder = tmp_path / "model"
    write(folder, {"config.json": hub_files(model)["config.json"]})
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    assert_same(read_published(folder).weights, model)

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        read_published(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [NAME, "deit_tiny_patch16_224"])
def test_timms_models_and_ours_come_with_the_weights_timm_publishes(name, tmp_path, monkeypatch):
    whole = getattr(timm.models, name)()
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    # In place of a download: timm reads the file that its configuration names.
    cfg = timm.get_pretrained_cfg(name)
    cfg.file = str(tmp_path / "weights.safetensors")
    cfgs = timm.models._registry._model_pretrained_cfgs
    monkeypatch.setitem(cfgs, f"{name}.{cfg.tag}", cfg)
    monkeypatch.setitem(cfgs, name, cfg)
    for source in (f"timm/{name}", f"timm/{name}.{cfg.tag}"):
        found = read_published(source)
        assert_same(found.weights, whole)
        assert found.cfg["num_classes"] == 1000
        assert tuple(found.cfg["input_size"]) == cfg.input_size


def test_a_file_or_folder_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_published("timm/x") and not is_published("x") and not is_published("https://x/y.pth")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "x").write_bytes(b"")
    assert not is_published("timm/x")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("timm/resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("hf-hub:me/pets@v1", "pets"),
        ("local-dir:a/b.hub", "b.hub"),
    ],
)
def test_names_for_files(source, name):
    assert short_name(source) == name


# --- what can't be had ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm/resnot50", "timm/resnot50: unknown model 'resnot50': did you mean resnet50"),
        ("timm/resnet50.foo", "no weights of resnet50 have the tag 'foo'; its tags are a1_in1k"),
        ("timm/vit_small_patch14_dinov2", "has no classifier, only features: fine-tune it first"),
        ("timm/simple_cnn", "no weights of simple_cnn are published"),
        ("hf-hub:a b", "expected hf-hub:OWNER/NAME"),
        ("local-dir:/no/where", "there is no such folder"),
    ],
)
def test_what_is_not_published_says_so_without_a_network(source, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_published(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b'{"model_type": "vit"}'}, "config.json has no 'architecture'"),
        ({"config.json": b'{"archi'}, "config.json can't be read"),
        ({"model.safetensors": b"not safetensors"}, "model: "),
        ({"model.safetensors": None}, "No suitable checkpoints found"),
        (
            {"config.json": b'{"architecture": "unheard", "pretrained_cfg": {"num_classes": 3}}'},
            "its architecture isn't known here: --plugin FILE",
        ),
    ],
)
def test_damaged_folders_are_refused(model, tmp_path, files, message):
    whole = hub_files(model) | files
    write(tmp_path / "model", {k: v for k, v in whole.items() if v is not None})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_published(f"local-dir:{tmp_path}/model")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_refused(model, tmp_path):
    other = timm.create_model(NAME, num_classes=5)
    folder = write(tmp_path / "model", hub_files(other))
    with pytest.raises(CheckpointError, match=r"size mismatch for classifier\.weight"):
        read_published(folder)


# --- the hub, by huggingface_hub ------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path / "cache") as server:
        yield server


def test_a_repository_of_the_hub(hub, model):
    hub.repositories["me/pets"] = hub_files(model)
    found = read_published("hf-hub:me/pets")
    assert found.name == "hf-hub:me/pets"
    assert_same(found.weights, model)


def test_repositories_that_cannot_be_had(hub, model):
    hub.gated.add("me/gated")
    hub.repositories["me/pets"] = {"config.json": hub_files(model)["config.json"]}
    hub.repositories["me/empty"] = {}
    for source, message in (
        ("me/gated", "its owner grants access to it one by one: ask on its page, then log in"),
        ("me/none", "the hub knows no such model, or it is private: check the name, or log in"),
        ("me/pets@v2", "it has no such revision"),
        ("me/empty", "it isn't in timm's hub form"),
        ("me/pets", "it isn't in timm's hub form .*no weights"),
    ):
        with pytest.raises(CheckpointError, match=f"^hf-hub:{source}: {message}") as caught:
            read_published(f"hf-hub:{source}")
        assert "\n" not in str(caught.value)


def test_without_a_network_the_way_out_is_named(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = r"hf download me/pets --revision v1 --local-dir FOLDER; then name the FOLDER$"
    with pytest.raises(CheckpointError, match=message):
        read_published("hf-hub:me/pets@v1")


def test_embeddings_are_no_classes():
    """timm's weights that give an embedding of CLIP, not classes: all whose number of classes is
    neither ImageNet's nor that of a larger set."""
    for name in timm.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(name).to_dict()
        embeds = 0 < cfg["num_classes"] <= 1280 and cfg["num_classes"] != 1000
        assert classes_of(cfg) == (0 if embeds else cfg["num_classes"]), name
    mine = {"architecture": "vit_base_patch16_clip_224", "num_classes": 512}
    assert classes_of({**mine, "label_names": [str(i) for i in range(512)]}) == 512
    with pytest.raises(CheckpointError, match="clip_224.openai has no classifier, only features"):
        read_published("timm/vit_base_patch16_clip_224.openai")
