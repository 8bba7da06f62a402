"""Pipelines of diffusers at tiny sizes with random weights, laid out as on the hub."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dtta_fast import zoo

WORDS = ("a", "photo", "of", "cat", "dog", "the", "ship", ".", "s", "e", "x", "t", "r", "o", "n", "i", "h")


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(zoo.folder("open_vocabulary") / "diffusion" / "tokenizer")


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    return T5Tokenizer(vocab=[*pieces, *((word, -4.0) for word in WORDS)], extra_ids=0)


def clip_encoder(width: int, projected: bool) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=width, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5_encoder(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def vae(channels: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, **config,
    ).eval()  # fmt: skip


def stable_diffusion_xl(**config: Any) -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=32, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8, **config,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return diffusers.StableDiffusionXLPipeline(
        vae(4), clip_encoder(16, False), clip_encoder(16, True), clip_tokenizer(), clip_tokenizer(), unet.eval(), scheduler
    )


def stable_diffusion_3(t5: bool = True) -> Any:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pooled_projection_dim=32, out_channels=16, pos_embed_max_size=8, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    for parameter in transformer.parameters():  # the library starts modulations at zero, which no condition could pass
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim < 2 else None
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = (t5_encoder(32), t5_tokenizer()) if t5 else (None, None)
    return diffusers.StableDiffusion3Pipeline(
        transformer.eval(), scheduler, vae(16, shift_factor=0.06, scaling_factor=1.5), clip_encoder(16, True), clip_tokenizer(),
        clip_encoder(16, True), clip_tokenizer(), *parts,
    )  # fmt: skip


def pixart(kind: str = "PixArtAlphaPipeline", additional: bool = False) -> Any:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=128 if additional else 8, patch_size=8 if additional else 2, num_layers=2, num_attention_heads=3,
        attention_head_dim=16, in_channels=4, out_channels=8, cross_attention_dim=48,
        caption_channels=16, use_additional_conditions=additional,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02)
    return getattr(diffusers, kind)(t5_tokenizer(), t5_encoder(16), vae(4), transformer.eval(), scheduler)


def gemma_tokenizer() -> GemmaTokenizer:
    letters = sorted({letter for word in WORDS for letter in word} | set("pcdg"))
    return GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *letters])}, merges=[], add_bos_token=True
    )


def deep_compression_autoencoder(channels: int, **config: Any) -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=channels, encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), **config,
    ).eval()  # fmt: skip


def sana(**config: Any) -> Any:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2, num_cross_attention_heads=4,
        cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=16, sample_size=32, **config,
    )  # fmt: skip
    tokenizer = gemma_tokenizer()
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    ).eval()  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.SanaPipeline(tokenizer, encoder, deep_compression_autoencoder(4, scaling_factor=0.4), transformer.eval(), scheduler)
