"""Models of images, and of images with texts."""

from __future__ import annotations

from typing import Any

from autopar.zoo import batches
from autopar.zoo.architecture import Architecture
from autopar.zoo.decoders import WIDTHS

PATCHES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "image_size": 24,
    "patch_size": 6,
    "num_labels": 12,
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 48, "depths": [2, 2], "num_heads": [12, 24], "window_size": 4}
SEGFORMER: dict[str, Any] = {
    "image_size": 64,
    "hidden_sizes": [24, 48, 96, 192],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 8],  # as in the released models, few in the first stages
    "decoder_hidden_size": 48,
}
STAGES = {"hidden_sizes": [24, 48, 96, 192], "num_labels": 12}
TEXT = {**WIDTHS, "num_attention_heads": 12, "max_position_embeddings": 64}
TOWER = {key: size for key, size in PATCHES.items() if key != "num_labels"}


def _images(name: str, **fields: Any) -> Architecture:
    return Architecture("vision", f"{name}Config", f"{name}ForImageClassification", fields, batches.images)


def _towers(name: str, text: dict[str, Any], **fields: Any) -> Architecture:
    fields = {"text_config": {**TEXT, **text}, "vision_config": TOWER, **fields}
    return Architecture("vision", f"{name}Config", f"{name}Model", fields, batches.captions)


ARCHITECTURES: dict[str, Architecture] = {
    "vit": _images("ViT", **PATCHES),
    "deit": _images("DeiT", **PATCHES),
    "swin": _images("Swin", **SWIN, num_labels=12),
    "convnext": _images("ConvNext", **STAGES, depths=[1, 1, 2, 1], image_size=32),
    "dinov2": _images("Dinov2", **{key: size for key, size in PATCHES.items() if key != "intermediate_size"}),
    "beit": _images("Beit", **PATCHES),
    "clip": _towers("CLIP", {"eos_token_id": 2}, projection_dim=96),
    "siglip": _towers("Siglip", {"projection_size": 192}),
    "segformer": _images("Segformer", **SEGFORMER, num_labels=12),
    "resnet": _images("ResNet", **STAGES, embedding_size=24, depths=[1, 1, 1, 1]),
}
