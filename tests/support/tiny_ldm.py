"""Text-to-image models of random weights in the real file formats, small enough for tests."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch

from synth.prompts import TRAIN_TEMPLATES

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Every word of the training templates, "close-up" in the three pieces that BERT's tokenizer makes of it.
WORDS = sorted({word for template in TRAIN_TEMPLATES for word in template.replace("-", " - ").split()})
BERT_WORDS = [*SPECIAL, *WORDS, "sculpture", "dog", "row", "##s"]
CLIP_WORDS = ["a", "photo", "of", "sculpture", "dog", "*"]


def folder() -> Path:
    """A new folder that goes when the process ends."""
    path = Path(tempfile.mkdtemp(prefix="tiny_ldm_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def tiny_ldm_folder() -> str:
    """An LDM in diffusers' folder layout that draws grey images of 8x8 pixels, as the toy data set has them."""
    return str(save_ldm(folder(), channels=1, vae_levels=2, latent_side=4))


def save_ldm(path: Path, **sizes) -> Path:
    tiny_ldm(**sizes).save_pretrained(path)
    return path


def tiny_ldm(channels: int = 3, vae_levels: int = 4, latent_side: int = 8, text_heads: int = 2):
    """diffusers' own pipeline: UNet (32, 64), a VAE of 32 channels per level, LDMBert of width 32."""
    from diffusers import DDIMScheduler, LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    torch.manual_seed(0)
    text = LDMBertConfig(
        vocab_size=len(BERT_WORDS), d_model=32, encoder_layers=2, encoder_attention_heads=text_heads, head_dim=8,
        encoder_ffn_dim=64,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return LDMTextToImagePipeline(
        vqvae=tiny_vae(channels, vae_levels), bert=LDMBertModel(text).eval(), tokenizer=bert_tokenizer(folder()),
        unet=tiny_unet(latent_side), scheduler=scheduler,
    )  # fmt: skip


def tiny_stable_diffusion(prediction_type: str = "v_prediction"):
    """The same with a CLIP text encoder, as Stable Diffusion has it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder())
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear", prediction_type=prediction_type,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=tiny_vae(3, 2), text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=tiny_unet(8),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def tiny_unet(latent_side: int):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=latent_side, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=32, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def tiny_vae(channels: int, levels: int):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=4, block_out_channels=(32,) * levels,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, scaling_factor=0.18215,
    )  # fmt: skip


def bert_tokenizer(path: Path):
    """From a vocab.txt alone, which is all that published BERT folders may hold."""
    from transformers import BertTokenizerFast

    (path / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    return BertTokenizerFast.from_pretrained(path)


def clip_tokenizer(path: Path):
    """Byte pairs that join the letters of a few words from the left: f o t o -> fo t o -> fot o -> foto."""
    from transformers import CLIPTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz*"]
    merges, joined = [], []
    for word in CLIP_WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(symbols)):
            merges.append(f"{''.join(symbols[:end])} {symbols[end]}")
            joined.append("".join(symbols[: end + 1]))
    names = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *joined])
    vocabulary = {token: index for index, token in enumerate([*names, "<|startoftext|>", "<|endoftext|>"])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizerFast.from_pretrained(path, model_max_length=77)
