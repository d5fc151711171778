"""Images of another height than width: training, resume, evaluation, and the file that is saved."""

import torch
import yaml
from PIL import Image
from runs import newest, train

import main
from architectures.position_embeddings import interpolate_grid
from augmentation.preprocessing import Preprocessing
from inference import from_content, load_for_inference

SHORT = ("--input-size", "8", "16", "--epochs", "1", "--warmup-epochs", "0")


def test_a_run_of_wide_images(images, tmp_path, capsys):
    """It is saved as a list, reopened as it was, and evaluated at other sizes too."""
    assert train(images, tmp_path, *SHORT) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["input_size"] == [8, 16]
    content = newest(tmp_path)
    assert content["preprocessing"]["input_size"] == content["config"]["input_size"] == [8, 16]
    assert content["model"]["pos_embed"].shape[1] == 1 + 2 * 4
    best = str(tmp_path / "best.pth")
    model, transform, _ = load_for_inference(best)
    image = transform(Image.new("RGB", (50, 30), "red"))
    assert image.shape == (3, 8, 16)
    with torch.no_grad():
        assert model(image[None]).shape == (1, 3)
    argv = ["--eval", "--resume", best, "--device", "cpu", "--num-workers", "0"]
    argv += ["--data-path", str(images)]
    for size in ([], ["12"], ["4", "32"]):  # 4 × 32 pixels are as many patches, in another grid
        assert main.main([*argv, *(["--input-size", *size] if size else [])]) == 0
    assert capsys.readouterr().out.count("top-1") >= 3
    at_size = Preprocessing.from_dict(content["preprocessing"] | {"input_size": [4, 32]})
    given = from_content(content, preprocessing=at_size).model.pos_embed
    own = content["model"]["pos_embed"]
    expected = interpolate_grid(own[:, 1:], (2, 4), (1, 8))
    torch.testing.assert_close(given.detach()[:, 1:], expected)
    assert torch.equal(given[:, :1], own[:, :1])
