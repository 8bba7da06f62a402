"""Depth and segmentation models of transformers: the library's own maps, and clear refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    ConvNextConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from dtta_fast import adapt, presets, zoo
from dtta_fast.tasks import Depth, Segmentation

CONFIG = presets.DENSE.replace(match="off", precheck="off", steps=1, pairs=2, guard=2, guard_threshold=0.0)
STAGES = ["stage1", "stage2", "stage3", "stage4"]
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "patch_size": 14}


def depth_anything() -> DepthAnythingForDepthEstimation:
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=16,
            head_in_channels=8,
            head_hidden_size=8,
            depth_estimation_type="metric",
            max_depth=10,
            **NECK,
        )
    )


def dpt() -> DPTForDepthEstimation:
    return DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=56,
            backbone_out_indices=[0, 1, 2, 3],
            is_hybrid=False,
            **NECK,
        )
    )


def images() -> torch.Tensor:
    return (torch.rand(2, 3, 61, 70, generator=torch.Generator().manual_seed(0)) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("make", [depth_anything, dpt])
def test_depth_is_the_library_s(make):
    torch.manual_seed(0)
    model = make().eval()
    processor = DPTImageProcessor(size={"height": 56, "width": 56}, keep_aspect_ratio=False)
    found = adapt(model, zoo.load("depth")[1], images(), config=CONFIG, task=Depth(processor))
    with torch.no_grad():
        expected = model(**processor(images=list(images()), return_tensors="pt")).predicted_depth
    torch.testing.assert_close(found.outputs_before[:, 0], expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    assert found.predictions.shape == (2, 56, 56)
    assert found.loss.isfinite().all()


def test_segmentation_without_an_auxiliary_head():
    torch.manual_seed(0)
    backbone = ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=STAGES)
    model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, hidden_size=8, num_labels=6, use_auxiliary_head=False))
    x = torch.rand(2, 3, 56, 56)
    found = adapt(model.eval(), zoo.load("segmentation")[1], x, config=CONFIG, task=Segmentation())
    with torch.no_grad():
        torch.testing.assert_close(found.outputs_before, model(x).logits)


def test_masks_of_queries_are_refused():
    backbone = SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], out_features=STAGES)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=1,
        num_attention_heads=2,
        num_queries=4,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_labels=6,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with pytest.raises(ValueError, match=r"whose masks belong to queries and not to classes; give a model with logits for every pixel"):
        adapt(model, zoo.load("segmentation")[1], torch.rand(1, 3, 64, 64), config=CONFIG, task=Segmentation())
