"""Tables that depend on the size of the image, against timm's functions and across shapes."""

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table, resize_rel_pos_bias_table_levit
from timm.models import maxxvit

from architectures.size_tables import fit_tables
from architectures.weights import PartialWeightsError, load_pretrained_weights


def test_squares_are_fitted_as_by_timm() -> None:
    source = timm.create_model("test_maxvit", num_classes=3, img_size=160)
    ours = timm.create_model("test_maxvit", num_classes=3, img_size=(192, 256))
    wanted = maxxvit.checkpoint_filter_fn(source.state_dict(), ours)
    report = load_pretrained_weights(ours, source.state_dict(), size=160)
    assert len(report.fitted) == 8
    for name in report.fitted:
        assert torch.equal(ours.state_dict()[name], wanted[name])


def test_levits_biases_are_fitted_as_by_timm() -> None:
    source = timm.create_model("levit_128s", num_classes=3, img_size=160).state_dict()
    ours = timm.create_model("levit_128s", num_classes=3, img_size=224)
    load_pretrained_weights(ours, source)
    name = "stages.0.blocks.0.attn.attention_biases"
    value, own = source[name], ours.state_dict()[name]
    assert torch.equal(own, resize_rel_pos_bias_table_levit(value.T, own.shape[::-1]).T)


def test_images_turned_on_their_side_turn_the_tables() -> None:
    """As many entries, another window: the size alone tells."""
    source = timm.create_model("test_coatnet", num_classes=3, img_size=(160, 256)).state_dict()
    ours = timm.create_model("test_coatnet", num_classes=3, img_size=(256, 160))
    name = next(n for n in source if n.endswith("relative_position_bias_table"))
    module = ours.get_submodule(name.rpartition(".")[0])
    before = tuple(reversed(module.window_size))
    wanted = resize_rel_pos_bias_table(
        source[name], module.window_size, source[name].shape, old_window_size=before
    )
    assert torch.equal(fit_tables(ours, source, (160, 256))[name], wanted)
    assert name not in fit_tables(ours, source)


@pytest.mark.parametrize(
    "name", ["hiera_tiny_224", "gcvit_xxtiny", "efficientformerv2_s0", "botnet26t_256"]
)
def test_constant_tables_stay_constant(name: str) -> None:
    source = timm.create_model(name, num_classes=3, img_size=256).state_dict()
    ours = timm.create_model(name, num_classes=3, img_size=384)
    changed = fit_tables(ours, source, 256)
    assert changed
    constant = {n: torch.full_like(source[n], 0.25) for n in changed}
    for new in fit_tables(ours, constant, 256).values():
        torch.testing.assert_close(new, torch.full_like(new, 0.25))


def test_mixing_of_patches_names_the_size() -> None:
    source = timm.create_model("resmlp_12_224", num_classes=3, img_size=224)
    ours = timm.create_model("resmlp_12_224", num_classes=3, img_size=160)
    with pytest.raises(PartialWeightsError, match="224 pixels: --input-size 224"):
        load_pretrained_weights(ours, source.state_dict())
