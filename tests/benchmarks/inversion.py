"""Class inversion steps and drawn images per second: ours against a plain fp32 loop that caches nothing.

`python -m tests.benchmarks.inversion`; exit code 1 if ours is the slower one. Run it on an idle machine. The model has
text2img-large's parts at a size for two cores: 128 pixels, latents of 16x16, random weights.
"""

from __future__ import annotations

import functools
import sys
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

from models.latent.text_to_image import load_text_to_image
from synth import SOURCES
from synth.inversion.latents import noise_scheduler, sample_scheduler
from synth.prompts import TRAIN_TEMPLATES
from synth.requests import Requests
from tests.benchmarks.timing import compare
from tests.support.tiny_ldm import BERT_WORDS, bert_tokenizer, folder
from utils.data.datasets import Dataset
from utils.data.images import ImageSet
from utils.data.manager import Task
from utils.training.run import Run
from utils.training.runtime import Runtime, fast_bf16

SIZE, CLASSES, SHOTS, BATCH, STEPS = 128, 5, 5, 5, 25
DRAWN, SAMPLE_STEPS, GUIDANCE = 10, 5, 10.0
TASK = Task(1, range(CLASSES), tuple(map(str, range(CLASSES))))


@functools.cache
def model_folder() -> str:
    """The model in diffusers' layout, saved once per process."""
    from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    torch.manual_seed(0)
    text = LDMBertConfig(
        vocab_size=len(BERT_WORDS), d_model=320, encoder_layers=8, encoder_attention_heads=8, head_dim=16,
        encoder_ffn_dim=1280,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(128, 256, 256), layers_per_block=2,
        cross_attention_dim=320, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    tokenizer, path = bert_tokenizer(folder()), folder()
    LDMTextToImagePipeline(
        vqvae=vae, bert=LDMBertModel(text), tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler()
    ).save_pretrained(path)
    return str(path)


def shots() -> ImageSet:
    """Five images of each of five classes."""
    pixels = torch.randint(256, (CLASSES * SHOTS, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    return ImageSet.of(pixels.to(torch.uint8), torch.arange(CLASSES).repeat_interleave(SHOTS))


def new_source(precision: str, run_folder: Path):
    images = shots()
    dataset = Dataset(
        "bench", images, images, list(TASK.class_names), SIZE, 3, True, (0.5,) * 3, (0.5,) * 3, "imagenet", ""
    )
    keys = {
        "name": "ldm", "ldm_ckpt": model_folder(), "g_local_bs": BATCH, "g_local_train_steps": STEPS,
        "sample_steps": SAMPLE_STEPS, "guidance": GUIDANCE, "sample_batch": DRAWN,
    }  # fmt: skip
    run = Run(run_folder, 0, Runtime(["cpu"], precision), progress=False)
    return SOURCES["ldm"](SOURCES["ldm"].Config.parse(keys), run, CLASSES, list(TASK.class_names), dataset)


def our_search(run_folder: Path, precision: str):
    """A search per call, from pixels to vectors: latents once, frozen weights in bf16, checkpoint and log."""
    source, numbers = new_source(precision, run_folder), count()

    def steps() -> int:
        source.invert(Task(next(numbers), TASK.classes, TASK.class_names), list(TASK.classes), shots())
        return STEPS

    return steps


def plain_search(run_folder: Path):
    """The textbook loop: every image through the autoencoder at every step, all in fp32."""
    model = load_text_to_image(model_folder())
    pixels, labels = shots().parts[0].images, shots().labels
    vectors = torch.nn.Parameter(model.initial_vector("sculpture").expand(CLASSES, -1).clone())
    optimizer, scheduler = torch.optim.AdamW([vectors], 0.02), noise_scheduler(model.schedule)

    def steps() -> int:
        for _ in range(STEPS):
            pick = torch.randint(len(pixels), (BATCH,))
            mean, std = model.moments(pixels[pick].float() / 127.5 - 1).chunk(2, dim=1)
            z0 = mean + std * torch.randn_like(mean)
            t, eps = torch.randint(1000, (BATCH,)), torch.randn_like(z0)
            prompts = [TRAIN_TEMPLATES[index] for index in torch.randint(len(TRAIN_TEMPLATES), (BATCH,))]
            context = model.context(prompts, vectors[labels[pick]])
            loss = F.mse_loss(model.predict(scheduler.add_noise(z0, eps, t), t, context), eps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        return STEPS

    return steps


def our_drawing(run_folder: Path, precision: str):
    """One request of two images per class and call."""
    source = new_source(precision, run_folder)
    source.vectors = {label: source.model.initial_vector("sculpture") for label in TASK.classes}
    source.fitted_classes = set(TASK.classes)
    requests = Requests.of_classes(list(TASK.classes), DRAWN // CLASSES, (0, "bench", 0))
    return lambda: len(source.generate(requests))


def plain_drawing(run_folder: Path):
    """The textbook DDIM loop with guidance in fp32."""
    model = load_text_to_image(model_folder())
    vectors = model.initial_vector("sculpture").expand(DRAWN, -1)

    @torch.no_grad()
    def images() -> int:
        scheduler = sample_scheduler("ddim", model.schedule, SAMPLE_STEPS)
        z = torch.randn(DRAWN, *model.latent_shape)
        for t in scheduler.timesteps:
            nothing = model.predict(z, t.expand(DRAWN), model.context([""] * DRAWN))
            told = model.predict(z, t.expand(DRAWN), model.context(["a photo of *"] * DRAWN, vectors))
            z = scheduler.step(nothing + GUIDANCE * (told - nothing), t, z).prev_sample
        return len(model.decode(z))

    return images


def main() -> int:
    precision = "bf16" if fast_bf16(torch.device("cpu")) else "fp32"
    good = True
    model = load_text_to_image(model_folder())
    print(f"Model of {model.frozen_bytes() / 4e6:.0f} M parameters, {torch.get_num_threads()} threads")
    for title, plain, ours in (
        (f"inversion steps/s, batch {BATCH}, {CLASSES * SHOTS} images", plain_search, our_search),
        (f"images/s, DDIM with {SAMPLE_STEPS} guided steps, {DRAWN} at once", plain_drawing, our_drawing),
    ):
        good &= compare(title, plain, ours, precision, 1.0)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
