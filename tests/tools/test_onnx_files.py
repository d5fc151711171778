"""tools.common.onnx_files: which exporter writes a model, and with how many images at a time."""

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from augmentation.preprocessing import Preprocessing
from errors import UserError
from inference import OnnxModel, metadata_of
from tools.common.onnx_files import OUTPUT, to_onnx


class WindowAttention(nn.Module):
    """Attention within windows, of five dimensions as in Hiera and Twins: the newer exporter
    refuses it. ``fixed`` reads the number of images while it is traced."""

    def __init__(self, *, fixed: bool = False) -> None:
        super().__init__()
        self.fixed = fixed
        self.head = nn.Linear(3, 5)

    def forward(self, images):
        x = images.flatten(2).transpose(1, 2)  # (B, 64, 3)
        count = int(x.shape[0]) if self.fixed else x.shape[0]
        x = x.reshape(count, 1, 4, 16, 3)
        x = F.scaled_dot_product_attention(x, x, x)
        return self.head(x.reshape(count, 64, 3).mean(1))


METADATA = metadata_of(
    {
        "config": {"model": "windows"},
        "class_names": list("abcde"),
        "preprocessing": Preprocessing(8, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3).to_dict(),
    }
)


def written(model, path, capsys):
    """(answers of onnxruntime to N images, what was said) of ``model`` as a file."""
    torch.manual_seed(0)
    to_onnx(model.eval(), torch.randn(2, 3, 8, 8), path, METADATA)
    assert {p.key: p.value for p in onnx.load(path).metadata_props} == METADATA
    session = onnxruntime.InferenceSession(path)
    said = capsys.readouterr().out
    return lambda x: torch.from_numpy(session.run([OUTPUT], {"images": x.numpy()})[0]), said


@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_the_newer_exporter_cannot_write_the_older_one_does(tmp_path, capsys, count):
    model = WindowAttention()
    answers, said = written(model, tmp_path / "x.onnx", capsys)
    images = torch.randn(count, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(answers(images), model(images), atol=1e-6, rtol=1e-5)
    assert "older exporter; the newer one: only 4D query, key, and value are supported" in said


def test_nothing_is_said_where_the_newer_exporter_does(tmp_path, capsys):
    _, said = written(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), tmp_path / "x.onnx", capsys)
    assert "older" not in said


def test_a_fixed_number_of_images_is_said_and_inference_keeps_to_it(tmp_path, capsys):
    model = WindowAttention(fixed=True)
    answers, said = written(model, tmp_path / "x.onnx", capsys)
    assert "fixes the number of images at 1" in said
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        wanted = model(images)
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        answers(images)
    torch.testing.assert_close(answers(images[:1]), wanted[:1], atol=1e-6, rtol=1e-5)
    loaded = OnnxModel(tmp_path / "x.onnx", torch.device("cpu"))
    torch.testing.assert_close(loaded(images), wanted, atol=1e-6, rtol=1e-5)


def test_a_model_that_neither_can_write_gets_both_reasons(tmp_path):
    class Rooted(nn.Module):
        def forward(self, images):
            raise RuntimeError("the root of it\nand more")

    with pytest.raises(UserError) as caught:
        to_onnx(Rooted(), torch.randn(2, 3, 8, 8), tmp_path / "x.onnx", {})
    message = str(caught.value)
    assert message.count("the root of it") == 2 and "\n" not in message and "\x1b" not in message
    assert not list(tmp_path.iterdir())
