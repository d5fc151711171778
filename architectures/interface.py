"""What timm asks of a model, written once for those that are a stem, blocks and a norm over tokens.

``timm.create_model(…, features_only=True)``, ``forward_intermediates``, ``reset_classifier``,
layer-wise learning rates and so on; timm's ``tests/test_models.py`` is the contract. TorchScript
compiles ``forward`` and what it calls: plain statements there, ``torch.jit.ignore`` elsewhere.
"""

from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from architectures.layers import classifier, init_linear, run_blocks


class TokenModel(nn.Module):
    """Images (B, C, H, W) -> ``embed`` -> ``blocks`` -> ``finish`` -> ``forward_head`` -> logits.

    A model sets ``patch_embed``, ``blocks`` (a Sequential over tokens (B, N, D)), ``norm`` and
    ``head``, and defines :meth:`embed`. ``global_pool`` is "token" (the first one), "avg" (the mean
    over the patches) or "" (none, then the head gets all tokens). ``patch_size`` is what the stem
    divides the image's height and width by.

    Raises:
        ValueError: ``global_pool`` is none of the model's ``POOLS``.
    """

    POOLS: tuple[str, ...] = ("token", "avg", "")
    # Tokens in front of the patches: in what the blocks see, and in what ``finish`` returns.
    num_block_prefix_tokens = 0
    num_prefix_tokens = 0
    __constants__ = ["num_prefix_tokens"]

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        patch_size: int,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = self._checked_pool(global_pool)
        self.patch_size = patch_size
        self.grad_checkpointing = False
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size}
            for i in range(depth)
        ]
        self.head_drop = nn.Identity()

    # --- from images to logits ----------------------------------------------------------------

    def embed(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, tokens, D), what the first block gets."""
        return self.patch_embed(x)

    def finish(self, x: Tensor) -> Tensor:
        """(B, tokens, D) of the last block -> (B, num_prefix_tokens + N, D) normalised."""
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, num_prefix_tokens + N, D) normalised tokens."""
        x = self.embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = run_blocks(self.blocks, x, True)
        else:
            x = self.blocks(x)
        return self.finish(x)

    def pool(self, x: Tensor) -> Tensor:
        """(B, tokens, D) -> (B, D), or as it is where ``global_pool`` is empty."""
        if self.global_pool == "avg":
            return x[:, self.num_prefix_tokens :].mean(dim=1)
        if self.global_pool == "token":
            return x[:, 0]
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, tokens, D) -> (B, classes) logits, or (B, D) features with ``pre_logits``."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, classes) logits."""
        return self.forward_head(self.forward_features(x))

    # --- features of single blocks ------------------------------------------------------------

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """What blocks return for (B, C, H, W) images, as timm's models answer it.

        Args:
            indices: Which blocks: the last so many, those listed, or all (None).
            return_prefix_tokens: Return the tokens in front of the patches too.
            norm: Apply the final norm to each.
            stop_early: Run no block after the last one that is asked for.
            output_fmt: "NCHW", (B, D, rows, columns), or "NLC", (B, N, D).
            intermediates_only: Leave out the result of ``forward_features``.
            output_dict: Name the parts as timm does, instead of a tuple or list.

        Returns:
            (features, list of intermediates); an intermediate with ``return_prefix_tokens`` is
            (patches, prefix tokens).

        Raises:
            ValueError: ``output_fmt`` is neither of the two.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is NCHW or NLC, not {output_fmt}")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        height, width = x.shape[-2:]
        x = self.embed(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = run_blocks([block], x, self.grad_checkpointing)
            if i in wanted:
                found.append(self.tokens(self.norm(x) if norm else x))
        prefix = [y[:, : self.num_block_prefix_tokens] for y in found]
        patches = [y[:, self.num_block_prefix_tokens :] for y in found]
        if output_fmt == "NCHW":
            grid = self.grid_of(height, width)
            patches = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in patches]
        with_prefix = return_prefix_tokens and self.num_block_prefix_tokens > 0
        if output_dict:
            parts = {"image_intermediates": patches}
            if with_prefix:
                parts["image_intermediates_prefix"] = prefix
            return parts if intermediates_only else parts | {"image_features": self.finish(x)}
        result = list(zip(patches, prefix, strict=True)) if with_prefix else patches
        return result if intermediates_only else (self.finish(x), result)

    def tokens(self, x: Tensor) -> Tensor:
        """What a block returns, as (B, tokens, D)."""
        return x

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image."""
        return height // self.patch_size, width // self.patch_size

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what ``forward_intermediates`` with ``indices`` doesn't need: the blocks after the
        last one, and as asked the norm and the head. Returns the indices counted from the first."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    # --- the head -----------------------------------------------------------------------------

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes``, none for 0, and another ``global_pool`` unless None."""
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = self._new_head()

    def _new_head(self) -> nn.Module:
        head = classifier(self.num_features, self.num_classes).to(next(self.parameters()))
        return head.apply(init_linear).train(self.training)

    def _checked_pool(self, global_pool: str) -> str:
        if global_pool not in self.POOLS:
            raise ValueError(
                f"{type(self).__name__} has no global_pool {global_pool!r}: "
                f"use one of {', '.join(map(repr, self.POOLS))}"
            )
        return global_pool

    # --- training -----------------------------------------------------------------------------

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides vectors."""
        return {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's description of the layers from input to output, for layer-wise learning rates."""
        return {
            "stem": r"^(?:cls_token|dist_token|pos_embed|patch_embed)",
            "blocks": [
                (r"^blocks\.(\d+)", None),
                (r"^norm", (99999,)),  # timm's mark for "with the layer before"
            ],
        }


class ClassAttentionModel(TokenModel):
    """A model whose class token comes after the blocks: ``blocks_token_only``, a ModuleList, takes
    (patches, class token) to the class token, one after the other (CaiT, PatchConvNet)."""

    num_prefix_tokens = 1

    def finish(self, x: Tensor) -> Tensor:
        if self.blocks_token_only is None:  # after prune_intermediate_layers
            return self.norm(x)
        cls_token = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            cls_token = block(x, cls_token)
        return self.norm(torch.cat((cls_token, x), dim=1))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        wanted = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:  # the class token is part of it
            self.blocks_token_only = self.cls_token = None
            self.num_prefix_tokens = 0
        return wanted

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        matcher = super().group_matcher(coarse)
        blocks, norm = matcher["blocks"]
        token_only = (r"^blocks_token_only\.(\d+)", None)
        return matcher | {"blocks": [blocks], "blocks_token_only": [token_only, norm]}
