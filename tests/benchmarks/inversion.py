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

from models.frozen import weight_bytes
from models.latent.text_to_image import load_text_to_image
from synth.inversion.latents import noise_scheduler
from synth.prompts import TRAIN_TEMPLATES
from synth.requests import Requests
from synth.samplers import sample_scheduler
from tests.benchmarks.parts import autoencoder, cpu_run, new_source, pictures, text_encoder, unet
from tests.benchmarks.timing import compare_all
from tests.support.tiny_ldm import bert_tokenizer, folder
from utils.data.manager import Task

SIZE, CLASSES, SHOTS, BATCH, STEPS = 128, 5, 5, 5, 25
DRAWN, SAMPLE_STEPS, GUIDANCE = 10, 5, 10.0
TASK = Task(1, range(CLASSES), tuple(map(str, range(CLASSES))))
SHOT_IMAGES = pictures(CLASSES * SHOTS, SIZE, CLASSES)


@functools.cache
def model_folder() -> str:
    """The model in diffusers' layout, saved once per process."""
    from diffusers import DDIMScheduler, LDMTextToImagePipeline

    torch.manual_seed(0)
    path, bert, net = folder(), text_encoder(320, layers=8, head_dim=16), unet((128, 256, 256), 320, side=16)
    LDMTextToImagePipeline(
        vqvae=autoencoder((32, 64, 128, 128)), bert=bert, tokenizer=bert_tokenizer(folder()), unet=net,
        scheduler=DDIMScheduler(),
    ).save_pretrained(path)  # fmt: skip
    return str(path)


def new_ldm(precision: str, run_folder: Path):
    return new_source(
        cpu_run(run_folder, precision), SIZE, CLASSES, name="ldm", ldm_ckpt=model_folder(), g_local_bs=BATCH,
        g_local_train_steps=STEPS, sample_steps=SAMPLE_STEPS, guidance=GUIDANCE, sample_batch=DRAWN,
    )  # fmt: skip


def our_search(run_folder: Path, precision: str):
    """A search per call, from pixels to vectors: latents once, frozen weights in bf16, checkpoint and log."""
    source, numbers = new_ldm(precision, run_folder), count()

    def steps() -> int:
        source.invert(Task(next(numbers), TASK.classes, TASK.class_names), list(TASK.classes), SHOT_IMAGES)
        return STEPS

    return steps


def plain_search(run_folder: Path):
    """The textbook loop: every image through the autoencoder at every step, all in fp32."""
    model = load_text_to_image(model_folder())
    pixels, labels = SHOT_IMAGES.parts[0].images, SHOT_IMAGES.labels
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
    source = new_ldm(precision, run_folder)
    source.vectors = {label: source.model.initial_vector("sculpture") for label in TASK.classes}
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
    model = load_text_to_image(model_folder())
    print(f"Model of {weight_bytes(model) / 4e6:.0f} M parameters, {torch.get_num_threads()} threads")
    return compare_all(
        (f"inversion steps/s, batch {BATCH}, {CLASSES * SHOTS} images", plain_search, our_search),
        (f"images/s, DDIM with {SAMPLE_STEPS} guided steps, {DRAWN} at once", plain_drawing, our_drawing),
        wanted=1.0,
    )


if __name__ == "__main__":
    sys.exit(main())
