"""docs/finetune.md: its commands are run, its recipes free and slow what they say."""

import shlex
from pathlib import Path

import pages
import pytest
from pages import ROOT, TINY, log, run

import main
import models
from optimization.freezing import Freezer
from optimization.groups import parameter_groups

FASHION = "/usr/share/datasets/fashion-mnist"
# The recipes name blocks of a DeiT of twelve.
TWELVE_BLOCKS = ["--model", "deit_tiny", "--input-size", "32", "--no-pretrained"]


def test_finetune(before_training):
    fashion = before_training / "fashion"
    for part, count in (("train", 30), ("t10k", 20)):
        pages.write_idx(fashion, part, count)
    ran = []
    for command in pages.commands("docs/finetune.md"):
        command = command.replace(FASHION, str(fashion))
        recipe = pages.option(shlex.split(command), "--config")
        if recipe and "finetune" in recipe:
            folder = run(command, [*TINY, *TWELVE_BLOCKS], f"output/{Path(recipe).stem}")
        else:
            folder = run(command, TINY, "")
        assert len(log(folder)) == 1
        ran.append(folder.name)
    assert {"fmnist_teacher", "finetune_frozen", "finetune_layerwise"} <= set(ran)


@pytest.mark.parametrize(
    "recipe, learning",
    (("frozen", {0: "head."}), ("gradual", {0: "head. norm.", 5: "blocks.8. blocks.11."})),
)
def test_recipes_free_what_they_say(recipe, learning):
    options = main.load_config(["--config", str(ROOT / f"configs/finetune_{recipe}.yaml")])
    model = models.build_model("deit_tiny", 3, input_size=32)
    freezer = Freezer(model, freeze=options.model.freeze, unfreeze_at=options.model.unfreeze_at)
    for epoch, prefixes in learning.items():
        freezer.apply(epoch)
        free = {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(any(n.startswith(p) for n in free) for p in prefixes.split())
        assert not any(n.startswith(("blocks.0.", "blocks.7.", "patch_embed.")) for n in free)
    if recipe == "gradual":
        freezer.apply(10)
        assert all(p.requires_grad for p in model.parameters())


def test_layerwise_recipe_slows_the_patch_embedding_to_two_percent():
    recipe = main.load_config(["--config", str(ROOT / "configs/finetune_layerwise.yaml")])
    model = models.build_model("deit_small", 3, input_size=224)
    groups = parameter_groups(model, weight_decay=0, layer_decay=recipe.optim.layer_decay)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert scale[id(model.head.weight)] == 1
    assert scale[id(model.patch_embed.proj.weight)] == pytest.approx(0.75**13)
    text = (ROOT / "configs/finetune_layerwise.yaml").read_text(encoding="utf-8")
    assert f"0.75^13 = {100 * 0.75**13:.0f} %" in text
