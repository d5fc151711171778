"""python -m tools.models"""

import json

import timm
import torchvision

from tools import models


def test_list_has_sizes_parameters_and_weights(capsys) -> None:
    assert models.main(["list", "deit_tiny_patch16_224", "torchvision/alexnet", "--json"]) == 0
    ours, alexnet = json.loads(capsys.readouterr().out)
    assert (ours["origin"], ours["size"], ours["published"]) == ("here", "224", True)
    count = torchvision.models.AlexNet_Weights.DEFAULT.meta["num_params"]
    assert (alexnet["origin"], alexnet["parameters"]) == ("torchvision", count)


def test_info_counts_as_timm_builds(capsys) -> None:
    argv = ["info", "vit_tiny_patch16_224", "--input-size", "32", "--num-classes", "5", "--json"]
    assert models.main([*argv, "--model-kwargs", "depth=2", "--depth", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    twin = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    assert found["parameters"] == sum(p.numel() for p in twin.parameters())
    outputs = {layer["name"]: layer["output"] for layer in found["layers"]}
    assert (outputs["blocks"], outputs["head"]) == ([1, 5, 192], [1, 5])


def test_unknown_names_get_the_nearest(capsys) -> None:
    assert models.main(["info", "resnet81"]) == 2
    assert "did you mean resnet18" in capsys.readouterr().err
    assert models.main(["list", "diet_tiny*"]) == 2
    assert "did you mean deit" in capsys.readouterr().err
