"""Checkpoints as others publish them: transformers' ViTMAE with drawn weights, and the same under the names of facebookresearch/mae."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from tests.synthetic_volumes import REAL

FOREIGN = sorted((REAL / "weights").rglob("*.pt"))
"""Real weights of other layouts, where they lie beside the repository."""


def reference(channels: int = 3, norm_pix: bool = True, **more: Any) -> ViTMAEForPreTraining:
    """A ViTMAE of 4 x 4 tokens whose weights, biases and tokens are all drawn; its positions are the published ones."""
    config = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "image_size": 16,
        "patch_size": 4,
        "num_channels": channels,
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
        "layer_norm_eps": 1e-6,
        "norm_pix_loss": norm_pix,
        "attn_implementation": "eager",
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = ViTMAEForPreTraining(ViTMAEConfig(**config | more))
        for name, weight in model.named_parameters():
            if "pos" not in name:
                nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=0.05)
        model.decoder.initialize_weights(16)  # transformers 4.57 leaves these positions zero in a new model; published files hold them
    return model.eval()


def facebook(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of facebookresearch/mae."""
    spelled = {
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "decoder.decoder_layers": "decoder_blocks",
        "vit.encoder.layer": "blocks",
        "vit.layernorm": "norm",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
    }
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = name
        for old, short in spelled.items():
            new = new.replace(old, short)
        new = new.removeprefix("decoder.")
        if ".key." in new or ".value." in new:
            continue
        if ".query." in new:
            parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
            out[new.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
        else:
            out[new] = value
    return out
