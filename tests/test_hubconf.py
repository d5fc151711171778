"""torch.hub: the entry points of this project, as torch.hub itself finds and calls them."""

import torch
from runs import ROOT

from augmentation.preprocessing import Preprocessing
from checkpointing.files import save_checkpoint
from models import build_model


def hub(name, *arguments, **options):
    return torch.hub.load(str(ROOT), name, *arguments, source="local", **options)


def test_the_registered_models_are_listed_and_nothing_else(tmp_path, monkeypatch):
    # As after a download: torch.hub lists only what is in its cache.
    (tmp_path / "owner_project_main").symlink_to(ROOT)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    cached = {"skip_validation": True, "trust_repo": True}
    names = torch.hub.list("owner/project:main", **cached)
    assert {"load", "deit_tiny_patch16_224", "cait_XXS24_224", "resnet18_cifar"} <= set(names)
    # timm's own come by timm, and what hubconf.py imports is no entry point.
    assert not {"resnet50", "nn", "timm", "Callable"} & set(names)
    told = torch.hub.help("owner/project:main", "deit_tiny_patch16_224", **cached)
    assert "published weights" in told


def test_a_model_by_name_takes_what_timm_takes():
    torch.manual_seed(0)
    model = hub("deit_tiny_patch16_224", num_classes=3, img_size=32).eval()
    torch.manual_seed(0)
    same = build_model("deit_tiny_patch16_224", 3, input_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), same(x))


def test_a_trained_model_is_loaded(tmp_path):
    model = build_model("deit_nano_patch4_32", 3, input_size=16).eval()
    weights = {name: x + 0.01 for name, x in model.state_dict().items()}
    content = {
        "model": weights,
        "config": {"model": "deit_nano_patch4_32"},
        "class_names": ["amber", "blue", "crimson"],
        "preprocessing": Preprocessing(16, 1.0, "bicubic", (0.5,) * 3, (0.25,) * 3).to_dict(),
    }
    save_checkpoint(tmp_path / "best.pth", content)
    model.load_state_dict(weights)
    x = torch.randn(2, 3, 16, 16)
    loaded = hub("load", str(tmp_path / "best.pth"))
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))
