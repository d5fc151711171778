"""training/asked.py: a file that names a model of the hub opens no connection."""

import json
import shutil
import socket

import pytest
import timm
import torch
from hub_server import Hub, running_hub
from runs import arguments, newest
from safetensors.torch import save

import main
from checkpointing.files import load_checkpoint, save_checkpoint
from errors import CheckpointError
from inference import load_for_inference
from tools import export, inspect, predict

NAME = "hf-hub:me/pets"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a model whose arguments differ from its architecture's."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32, depth=1)
    cfg = {"input_size": [3, 32, 32], "num_classes": 3, "classifier": "head"}
    content = {"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": cfg}
    content["model_args"] = {"img_size": 32, "depth": 1}
    with running_hub(tmp_path_factory.mktemp("hub") / "cache") as server:
        server.repositories["me/pets"] = {
            "config.json": json.dumps(content).encode(),
            "model.safetensors": save(model.state_dict()),
        }
        yield server


@pytest.fixture(scope="module")
def trained(hub, images, tmp_path_factory):
    """The folder of a run of that model; the hub's cache is emptied behind it."""
    folder = tmp_path_factory.mktemp("run")
    argv = arguments(images, folder, "--model", NAME, "--input-size", "32", "--epochs", "1")
    assert main.main([*argv, "--no-repeated-aug", "--warmup-epochs", "0"]) == 0
    assert hub.asked
    empty_cache()
    return folder


def empty_cache():
    from huggingface_hub import constants

    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


@pytest.fixture
def no_connections(hub: Hub, monkeypatch):
    """A connection, or the look-up of a name, ends the test."""
    hub.asked.clear()

    def refused(*arguments: object, **_: object) -> None:
        pytest.fail(f"a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def test_checkpoints_of_a_model_of_the_hub_need_no_network(
    trained, images, tmp_path, no_connections, capsys
):
    best = str(trained / "best.pth")
    assert len(load_for_inference(best).model.blocks) == 1  # test_vit has 6
    assert main.main(["--eval", "--resume", best, "--device", "cpu", "--num-workers", "0"]) == 0
    one = str(next(images.rglob("*.png")))
    assert predict.main([best, one, "--device", "cpu"]) == 0
    assert inspect.main([best]) == 0
    assert export.main([best, "--format", "safetensors", "--output", str(tmp_path)]) == 0
    assert len(load_for_inference(tmp_path / "best.safetensors").model.blocks) == 1
    newest_file = str(sorted(trained.glob("checkpoint-*.pth"))[-1])
    copy = shutil.copy(newest_file, tmp_path)
    argv = ["--resume", copy, "--epochs", "2", "--device", "cpu"]
    assert main.main([*argv, "--output-dir", str(tmp_path)]) == 0
    # What goes on from it can be read as well.
    assert newest(tmp_path)["hub_config"] == load_checkpoint(best)["hub_config"]
    argv = arguments(images, tmp_path / "tuned", "--finetune", best, "--epochs", "1")
    argv += ["--model", "test_vit", "--input-size", "32", "--warmup-epochs", "0"]
    assert main.main([*argv, "--allow-partial", "--no-repeated-aug"]) == 0


@pytest.fixture
def undescribed(trained, tmp_path) -> str:
    """Such a checkpoint from elsewhere, without the description."""
    content = load_checkpoint(trained / "best.pth")
    del content["hub_config"]
    save_checkpoint(tmp_path / "old.pth", content)
    return str(tmp_path / "old.pth")


def test_without_a_description_the_way_out_is_named(undescribed, no_connections, capsys):
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE=0.*hf download me/pets config.json"):
        load_for_inference(undescribed)
    for argv in (["--eval", "--resume", undescribed], ["--resume", undescribed, "--epochs", "2"]):
        assert main.main([*argv, "--device", "cpu", "--num-workers", "0"]) == 2
        assert "put HF_HUB_OFFLINE=0 in front of the command" in capsys.readouterr().err


def test_the_hub_is_asked_where_the_user_says_so(undescribed, hub, monkeypatch):
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert len(load_for_inference(undescribed).model.blocks) == 1
    assert "/me/pets/resolve/main/config.json" in hub.asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.asked.clear()
    assert len(load_for_inference(undescribed).model.blocks) == 1  # it is in the cache now
    assert hub.asked == []
    empty_cache()
    assert len(load_for_inference(NAME).model.blocks) == 1  # a name that the user gives
    assert hub.asked
    empty_cache()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "no\x1b[2Jmodel"}, r"its architecture no\\x1b\[2Jmodel isn't known here"),
        ({"architecture": 7}, "its hub_config is none that"),
        ({"model_args": None}, "its hub_config is none that"),
        ({"model_args": {"depth": "many"}}, "its hub_config can't be built"),
        ({"model_args": {"norm_layer": "os.system"}}, "its hub_config can't be built"),
        ({"model_args": {"unknown": 1}}, "its hub_config can't be built"),
        ({"model_args": {"depth": 2}}, "blocks.1"),
        ({"model_args": {"depth": 10**12}}, "'depth' of more than 300"),
        ({"model_args": {"embed_dim": [10**9, 2]}}, "'embed_dim' of more than 100,000"),
        ({"model_args": {"block_cfg": [[16, 2048]]}}, "its hub_config can't be built"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "blocks.1"),
        ({"pretrained_cfg": {"input_size": "x"}}, "its hub_config can't be built|built"),
    ],
)
def test_descriptions_that_are_none(trained, no_connections, change, message):
    content = load_checkpoint(trained / "best.pth")
    content["hub_config"] = {**content["hub_config"], **change}
    save_checkpoint(trained / "other.pth", content)
    with pytest.raises(CheckpointError, match=message):
        load_for_inference(trained / "other.pth")
