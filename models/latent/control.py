"""Stable Diffusion that draws along edges: diffusers' pipeline with a published ControlNet, behind one adapter."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from types import MethodType

import torch
from torch import Generator, Tensor, nn

from models.files.control_sd15 import read_controlnet_file
from models.files.diffusers_folder import PublishedModel, check_folder, check_tokenizer
from models.files.diffusers_parts import TextToImageParts, read_folder, read_network
from models.files.weights import check_weights_file, is_weights_file, what_is_missing
from models.latent.text_to_image import ON_CPU, Placement, TextToImage
from utils.run.errors import WeightsError
from utils.training import seeding
from utils.training.ledger import counted

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
BASE = PublishedModel("base", "text-to-image model", SD15, file="control_sd15_canny.pth")
CONTROLNET = PublishedModel("controlnet", "ControlNet", "lllyasviel/sd-controlnet-canny", index="config.json")
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # of Stable Diffusion 1.x
# What turns the noise of training into the DDIM of ControlNet's code: 20 steps are 951, 901, ..., 1, and the last one
# ends at the noise of step 0 instead of at none.
DDIM = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}


class ControlNetPipeline(TextToImage):
    """Stable Diffusion that draws along given edges, frozen (Zhang et al., ICCV 2023, arXiv:2302.05543).

    It is used as by Duan et al. (BMVC 2025, arXiv:2311.18266): DDIM without fresh noise, guidance away from a negative
    prompt, and the control in both branches of it.

    Args:
        parts: of Stable Diffusion, as `read_folder` or `read_controlnet_file` gave them; they are moved, not copied.
        controlnet: ControlNetModel that was trained on this Stable Diffusion, or on one of its shape.
        placement: of the frozen weights and of the latents.

    Raises:
        WeightsError: if the ControlNet is not made for this Stable Diffusion.
    """

    def __init__(self, parts: TextToImageParts, controlnet: nn.Module, placement: Placement = ON_CPU):
        from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

        _require_kin(parts, controlnet)
        super().__init__(parts, placement=placement)
        both = f"{self._fingerprint} {seeding.hash_tensors(controlnet.state_dict())}"  # of the weights as they came
        self._fingerprint = hashlib.sha256(both.encode()).hexdigest()
        self.vae_factor, self.controlnet = parts.vae_factor, controlnet
        self.to(self.device, self.dtype).freeze()
        # Decoding has most of the pixels: image by image, it needs no more memory than the denoising of a batch.
        parts.vae.enable_slicing()
        # Without the safety checker, which blackens some images; texts are embedded once, by `embed`.
        self.pipeline = StableDiffusionControlNetPipeline(
            vae=parts.vae, text_encoder=None, tokenizer=None, unet=parts.unet, controlnet=controlnet,
            scheduler=DDIMScheduler.from_config(parts.schedule | DDIM), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False)  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)
        for network in (parts.unet, controlnet):  # which the pipeline calls by itself
            network.forward = MethodType(counted(type(network).forward), network)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Return CLIP's last hidden state at its full length: float32 (N, 77, W) on the CPU, one row per text."""
        return self.context(texts).cpu()

    @torch.no_grad()
    def draw(
        self, edges: Tensor, prompts: Tensor, negative: Tensor, generators: list[Generator],
        steps: int, guidance: float, strength: float) -> Tensor:  # fmt: skip
        """Draw one image per edge map by DDIM (Song et al., 2021, Eq. 12, eta = 0).

        Args:
            edges: bool (B, H, W); sides are multiples of 64, for other models at least of the pixels per latent.
            prompts: (B, 77, W), of ``embed``.
            negative: (1, 77, W), of ``embed``: what the images are guided away from.
            generators: B of the CPU. An image depends on its own alone, whatever else is drawn beside it.
            steps: of DDIM.
            guidance: at least 1, which turns it off.
            strength: of the control; 0 turns it off.

        Returns:
            float32 (B, 3, H, W), about [-1, 1]. The reference truncates colours; round them.
        """
        count, height, width = edges.shape
        assert len(prompts) == len(generators) == count, (len(prompts), len(generators), count)
        # diffusers would shrink other sizes without a word, and put grey pixels among the edges.
        assert height % self.vae_factor == width % self.vae_factor == 0, (height, width, self.vae_factor)
        # Drawn by us: diffusers would draw in the number format of the weights, which gives other numbers in each.
        shape = (self.latent_shape[0], height // self.vae_factor, width // self.vae_factor)
        noise = [torch.randn(shape, generator=generator) for generator in generators]
        latents = self.pipeline(
            image=edges[:, None].expand(-1, 3, -1, -1).float(), latents=self.take(torch.stack(noise)),
            prompt_embeds=self.take(prompts), negative_prompt_embeds=self.take(negative).expand(count, -1, -1),
            num_inference_steps=steps, guidance_scale=float(guidance), controlnet_conditioning_scale=float(strength),
            eta=0.0, output_type="latent", return_dict=False,
        )[0]  # fmt: skip
        # Decoded here: in half precision, the pipeline's own step from [-1, 1] to [0, 1] would round once more.
        return self.decode(latents)


def check_controlnet(base: str, controlnet: str | None, offline: bool, tokenizer: str = CLIP_TOKENIZER) -> None:
    """See that a model is here or may be fetched, without reading its weights; arguments as below.

    Raises:
        WeightsError: for weights, a folder or a tokenizer that are absent or incomplete, and for a ControlNet beside a
            file; it names all of them, and where they go.
    """
    if is_weights_file(base):
        words = partial(check_tokenizer, tokenizer, "tokenizer.json", CLIP_TOKENIZER, offline)
        wrong = what_is_missing([partial(check_weights_file, base, "base"), words])
        if controlnet is not None:
            remedy = f"leave controlnet out, or name as base a folder or a hub id such as {BASE.example}"
            wrong += [f"controlnet={controlnet!r}, but the file base={base!r} holds a ControlNet of its own: {remedy}"]
    else:
        control = partial(check_folder, controlnet or CONTROLNET.example, offline, CONTROLNET)
        wrong = what_is_missing([partial(check_folder, base, offline, BASE), control])
    if wrong:
        raise WeightsError("\nerror: ".join(wrong))


def load_controlnet(
    base: str, controlnet: str | None = None, *, tokenizer: str = CLIP_TOKENIZER, placement: Placement = ON_CPU,
    offline: bool = False) -> ControlNetPipeline:  # fmt: skip
    """Load a published Stable Diffusion with a ControlNet.

    Args:
        base: a hub id, a folder with model_index.json, or control_sd15_canny.pth, which holds both.
        controlnet: a hub id, or a folder with config.json; null: the one in the file, and for other bases
            lllyasviel/sd-controlnet-canny.
        tokenizer: folder or hub id of the CLIP tokenizer that goes with a file.
        placement: see `ControlNetPipeline`.
        offline: fetch nothing; what is absent is an error.

    Raises:
        WeightsError: if weights are absent, incomplete, foreign or do not fit.
    """
    check_controlnet(base, controlnet, offline, tokenizer)
    if is_weights_file(base):
        return ControlNetPipeline(*read_controlnet_file(base, tokenizer, offline), placement)
    parts = read_folder(base, offline, BASE)
    control = read_network(controlnet or CONTROLNET.example, "ControlNetModel", offline, CONTROLNET)
    return ControlNetPipeline(parts, control, placement)


def _require_kin(parts: TextToImageParts, controlnet: nn.Module) -> None:
    unet, control = parts.unet.config, controlnet.config
    same = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")
    pairs = {key: (json.dumps(control[key]), json.dumps(unet[key])) for key in same}  # lists and tuples are one there
    # Each width of the edges' encoder but the first halves their sides, down to those of the latents.
    pairs["pixels per latent"] = (2 ** (len(control["conditioning_embedding_out_channels"]) - 1), parts.vae_factor)
    for what, (value, wanted) in pairs.items():
        if value != wanted:
            remedy = "Name a ControlNet that was trained on this version of Stable Diffusion"
            found = f"its {what} is {value}, the base's {wanted}"
            raise WeightsError(f"this ControlNet is not made for this base: {found}. {remedy}")
