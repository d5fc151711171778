"""The 49 names of facebookresearch/deit build its models: same parameters, same logits.

``facebook_models.json`` was made from that repository's own files: for each name the number of its
parameters, that of its tensors, a digest of their names and shapes, and the first logits of a
model filled by ``fill`` (computed in double precision). ``options`` are the arguments of a model
too large for a test; two of the names, deit_giant_40x2 and deit_Giant_48x2, refer to a class that
was never published: theirs are of the same size with the published parallel blocks.
"""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401 (registers them)

REFERENCES = json.loads((Path(__file__).parent / "facebook_models.json").read_text())


def digest(model: nn.Module) -> str:
    """sha256 of the names and shapes of all tensors, in order."""
    lines = [f"{name} {list(x.shape)}" for name, x in model.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fill(model: nn.Module) -> None:
    """Values for which every parameter matters and logits are of order 1: normal, with the index of
    the tensor as seed. Matrices have the variance 1 / inputs, vectors mean and std 0.3, tokens and
    positions std 0.5."""
    with torch.no_grad():
        for seed, x in enumerate(model.state_dict().values()):
            values = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            if x.ndim == 1:
                values = 0.3 + 0.3 * values
            else:
                values *= 0.5 if x.ndim == 3 else x[0].numel() ** -0.5
            x.copy_(values)


def image(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1000))


def empty(name: str, **options: int) -> nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize("name", REFERENCES)
def test_parameters(name):
    reference, model = REFERENCES[name], empty(name)
    assert sum(p.numel() for p in model.parameters()) == reference["parameters"]
    assert len(model.state_dict()) == reference["tensors"]
    assert digest(model) == reference["digest"]


@pytest.mark.parametrize("name", REFERENCES)
def test_logits(name):
    reference = REFERENCES[name]
    model = empty(name, **reference["options"]).to_empty(device="cpu").eval()
    fill(model)
    with torch.inference_mode():
        logits = model(image(reference["image_size"]))
    assert logits.shape == (1, 1000)
    expected = torch.tensor(reference["logits"])
    torch.testing.assert_close(logits[0, : len(expected)], expected, atol=1e-4, rtol=1e-4)
