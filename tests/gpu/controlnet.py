"""Images per second and peak memory of Stable Diffusion 1.5 with ControlNet in bf16, at its full size.

`python -m tests.gpu.controlnet` on a machine with a CUDA GPU; nothing is fetched. The weights are random, which changes
neither. A tenth of the widths runs on a CPU: `--device cpu --narrow 10 --side 64 --steps 2 --batches 1 2`.
"""

from __future__ import annotations

import argparse
import time

import torch

from models.files.diffusers_folder import LDM_SCHEDULE
from models.files.diffusers_parts import TextToImageParts
from models.latent.control import ControlNetPipeline, EdgeSampling
from models.latent.text_to_image import Placement
from tests.support.tiny_ldm import clip_tokenizer, folder

GUIDANCE, EDGE_DENSITY = 9.0, 0.07
UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512, "scaling_factor": 0.18215,
}  # fmt: skip
TEXT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "projection_dim": 768,
}  # fmt: skip
HINT_WIDTHS = (16, 32, 96, 256)


def build(device: str, narrow: int) -> ControlNetPipeline:
    """The architecture as published, but for the vocabulary, which costs no time; ``narrow`` divides its widths."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    words = {"vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": eos}
    with torch.device(device):  # a billion random numbers are drawn faster there
        unet = UNet2DConditionModel(**narrowed(UNET, narrow))
        control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_WIDTHS)
        vae = AutoencoderKL(**narrowed(VAE, narrow))
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT, **words))
    parts = TextToImageParts(vae, text_encoder, tokenizer, unet, dict(LDM_SCHEDULE), latent_side=64)
    return ControlNetPipeline(parts, control, Placement(torch.device(device), torch.bfloat16))


def narrowed(config: dict, narrow: int) -> dict:
    """Widths stay multiples of the 32 groups that are normalised together."""
    widths = [max(width // narrow // 32, 1) * 32 for width in config["block_out_channels"]]
    return config | {"block_out_channels": widths}


def measure(model: ControlNetPipeline, count: int, side: int, steps: int) -> str:
    """Images per second and peak memory of one call, after one of two steps that picks the kernels."""
    edges = torch.rand(count, side, side, generator=torch.Generator().manual_seed(0)) < EDGE_DENSITY
    prompts, negative = model.embed(["a photo of dog"] * count), model.embed(["row"])

    def draw(steps: int) -> None:  # its images end on the CPU, so nothing is pending
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        model.draw(edges, prompts, negative, generators, EdgeSampling(steps, GUIDANCE, 1.0))

    draw(2)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    draw(steps)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else float("nan")
    return f"batch {count:2d}: {count / seconds:.2f} images/s, {seconds:.2f} s, peak {peak:.1f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM")
    parser.add_argument("--narrow", type=int, default=1, help="divides the widths")
    options = parser.parse_args()
    model = build(options.device, options.narrow)
    print(f"{model.frozen_bytes() / 2**30:.2f} GiB of weights, {options.side} pixels, {options.steps} steps")
    for count in options.batches:
        print(measure(model, count, options.side, options.steps), flush=True)


if __name__ == "__main__":
    main()
