"""The key layout of transformers' vision towers -> timm's, so that `google/siglip-...` files load as well as timm's.

For ViT, DINOv2 (with registers too), DINOv3, CLIP and SigLIP as they are published; of a whole CLIP or SigLIP the
vision half is taken. Source: the modules of transformers 4 and 5, which both write these names (5 has others in
memory).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

MARK = "embeddings.patch_embedding"  # in every such file, in no other layout
VISION = "vision_model."
PARTS = ("q", "k", "v")
RENAMES = (
    (r"^embeddings\.(class_embedding|cls_token)$", "cls_token"),
    (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.(mask_token|register_tokens|storage_tokens)$", r"\1"),  # the authors' names, which timm knows
    (r"^(encoder\.layers?|layer)\.", "blocks."),
    (r"\.attention\.attention\.(q|k|v)[a-z]+\.", r".attn.\1."),
    (r"\.(self_attn|attention)\.(q|k|v)_proj\.", r".attn.\2."),
    (r"\.(attention\.output\.dense|self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.(layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale(1|2)\.lambda1$", r".ls\1.gamma"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(post_layernorm|layernorm)\.", "norm."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)


def to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and join; a file in another layout comes back as it is, a key without a rule under its own name.

    Raises:
        KeyError: a block lacks its query, key or value.
    """
    if not any(MARK in key for key in state):
        return state
    if any(key.startswith(VISION) for key in state):
        state = {key.removeprefix(VISION): one for key, one in state.items() if key.startswith(VISION)}
    if any(key.startswith("layer.") for key in state):  # DINOv3, whose authors call registers so
        state = {key.replace("register_tokens", "storage_tokens"): one for key, one in state.items()}
    found: dict[str, Tensor] = {}
    split: dict[str, dict[str, Tensor]] = {}
    for key, one in state.items():
        name = _rename(key)
        pool = re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", name)
        part = re.fullmatch(r"(.+\.attn)\.(q|k|v)\.(weight|bias)", name)
        if pool:  # the query comes from the probe: timm keeps it apart
            width = len(one) // 3
            found[f"attn_pool.q.{pool[1]}"], found[f"attn_pool.kv.{pool[1]}"] = one[:width], one[width:]
        elif part:
            split.setdefault(f"{part[1]}.qkv.{part[3]}", {})[part[2]] = one
        elif name != "embeddings.position_ids":  # numbers from 0 up, in old files
            found[name] = one.reshape(1, -1, one.shape[-1]) if name in ("cls_token", "pos_embed") else one
    return found | {key: _joined(key, parts) for key, parts in split.items()}


def _joined(key: str, parts: dict[str, Tensor]) -> Tensor:
    """Query, key and value in one; DINOv3's keys have no bias, where its authors have zeros."""
    if key.endswith("bias") and "k" not in parts:
        parts = {**parts, "k": torch.zeros_like(parts["q"])}
    return torch.cat([parts[one] for one in PARTS])


def _rename(key: str) -> str:
    for pattern, replacement in RENAMES:
        key = re.sub(pattern, replacement, key)
    return key
