"""Text-to-image models of random weights in the real file formats, small enough for tests."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from synth.prompts import TRAIN_TEMPLATES

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Every word of the training templates, "close-up" in the three pieces that BERT's tokenizer makes of it.
WORDS = sorted({word for template in TRAIN_TEMPLATES for word in template.replace("-", " - ").split()})
BERT_WORDS = [*SPECIAL, *WORDS, "sculpture", "dog", "row", "##s"]
CLIP_WORDS = ["a", "photo", "of", "sculpture", "dog", "*"]
DDIM = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def folder() -> Path:
    """A new folder that goes when the process ends."""
    path = Path(tempfile.mkdtemp(prefix="tiny_ldm_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def tiny_ldm_folder() -> str:
    """An LDM in diffusers' folder layout that draws grey images of 8x8 pixels, as the toy data set has them."""
    path = folder()
    tiny_ldm(channels=1, vae_levels=2, latent_side=4).save_pretrained(path)
    return str(path)


def tiny_ldm(channels: int = 3, vae_levels: int = 4, latent_side: int = 8, text_heads: int = 2):
    """diffusers' own pipeline: UNet (32, 64), a VAE of 32 channels per level, LDMBert of width 32."""
    from diffusers import DDIMScheduler, LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    torch.manual_seed(0)
    text = LDMBertConfig(
        vocab_size=len(BERT_WORDS), d_model=32, encoder_layers=2, encoder_attention_heads=text_heads, head_dim=8,
        encoder_ffn_dim=64,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, **DDIM)
    vae, bert, words = tiny_vae(channels, vae_levels), LDMBertModel(text).eval(), bert_tokenizer(folder())
    return LDMTextToImagePipeline(
        vqvae=vae, bert=bert, tokenizer=words, unet=tiny_unet(latent_side), scheduler=scheduler
    )


def tiny_stable_diffusion(prediction_type: str = "v_prediction"):
    """The same with a CLIP text encoder, as Stable Diffusion has it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder())
    scheduler = DDIMScheduler(beta_start=0.001, beta_end=0.02, prediction_type=prediction_type, **DDIM)
    vae, encoder = tiny_vae(3, 2), clip_encoder(tokenizer, width=32, heads=2)
    return StableDiffusionPipeline(vae, encoder, tokenizer, tiny_unet(8), scheduler, **UNCHECKED)


def clip_encoder(tokenizer, width: int, heads: int):
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=heads, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )).eval()  # fmt: skip


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


# ---------------------------------------------------------------------- what tests do to folders


def edit_json(path: Path, **changes) -> None:
    """Set keys; `...` takes one away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_weights(path: Path, change) -> None:
    """Call ``change`` with the tensors of a safetensors file, which it may alter, and write them back."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def put_into_cache(cache: Path, name: str, files: str) -> Path:
    """Leave behind what a download of the model `nobody/<name>` does, and return the folder of its files."""
    repository = cache / f"models--nobody--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    return Path(shutil.copytree(files, repository / "snapshots" / "abc"))
