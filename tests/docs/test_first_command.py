"""README.md's first command on one's own images: it fine-tunes, from a hub and from a file."""

import pages
import pytest
import timm
import torch
from hub_server import running_hub
from runs import newest
from safetensors.torch import save
from tiny_images import image_folder

from architectures.factory import published_cfg

MODEL = "deit_small_patch16_224"
QUICK = ("--epochs", "1", "--batch-size", "2", "--num-workers", "0", "--device", "cpu")
QUICK += ("--warmup-epochs", "0", "--no-tensorboard")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Those of timm's model, untrained, of 1000 classes."""
    torch.manual_seed(0)
    return timm.create_model(MODEL).state_dict()


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """The folder of the README, with few images."""
    image_folder(tmp_path / "pets", {"train": 1, "val": 1}, classes=("cat", "dog"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(pages.ROOT / "configs")


def first_command() -> str:
    return next(c for c in pages.commands("README.md") if c.startswith("python main.py"))


def assert_fine_tuned(content, weights):
    """The backbone, frozen in the first epoch, has the published weights; the head is another."""
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.weight"):
        assert torch.equal(content["model"][name], weights[name]), name
    assert content["model"]["head.weight"].shape == (2, 384)
    assert not torch.equal(content["model"]["norm.weight"], weights["norm.weight"])


def test_it_fine_tunes_as_written(pets, tmp_path, weights):
    assert "--config configs/finetune_" in first_command()
    repository = published_cfg(MODEL)["hf_hub_id"]
    with running_hub(tmp_path / "cache") as hub:
        hub.repositories[repository] = {"model.safetensors": save(weights)}
        folder = pages.run(first_command(), QUICK, "")
    assert_fine_tuned(newest(folder), weights)
    [next_one] = [c for c in pages.commands("README.md") if "--eval --resume" in c][:1]
    assert str(folder) in next_one


def test_without_a_network_the_error_names_the_file_and_the_option(
    pets, tmp_path, weights, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    words = pages.shrink(first_command(), *QUICK)
    assert pages.training.main(words[2:]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"/{published_cfg(MODEL)['hf_hub_id']}/resolve/main/model.safetensors" in error
    assert error.endswith("use --no-pretrained --finetune FILE")
    (tmp_path / "model.safetensors").write_bytes(save(weights))
    brought = ("--no-pretrained", "--finetune", "model.safetensors")
    assert_fine_tuned(newest(pages.run(first_command(), [*QUICK, *brought], "")), weights)
