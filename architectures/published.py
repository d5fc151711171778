"""Published state dicts, fitted to the names and shapes of DeiT, DeiT III and CaiT."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from architectures.position_embeddings import fit_positions

# The parts of parallel blocks by timm's names, and by those of facebookresearch/deit.
_PARALLEL = {
    "attns.0.norm": "norm1",
    "attns.1.norm": "norm11",
    "attns.0.attn": "attn",
    "attns.1.attn": "attn1",
    "attns.0.ls.gamma": "gamma_1",
    "attns.1.ls.gamma": "gamma_1_1",
    "ffns.0.norm": "norm2",
    "ffns.1.norm": "norm21",
    "ffns.0.mlp": "mlp",
    "ffns.1.mlp": "mlp1",
    "ffns.0.ls.gamma": "gamma_2",
    "ffns.1.ls.gamma": "gamma_2_1",
}


def adapted(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` with ``model``'s names and, for another image size, its position embeddings.

    It may be timm's or that of facebookresearch/deit, with "module." in front and inside "model".
    """
    state_dict = state_dict.get("model", state_dict)
    found = {_facebook_name(name.removeprefix("module.")): x for name, x in state_dict.items()}
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (None,))[1:]
    return found | fit_positions(model, found, size or None).tensors


def _facebook_name(name: str) -> str:
    name = re.sub(r"\bls([12])\.gamma$", r"gamma_\1", name)
    parallel = r"\b(?:attns|ffns)\.[01]\.(?:norm|attn|mlp|ls\.gamma)\b"
    return re.sub(parallel, lambda match: _PARALLEL[match[0]], name)
