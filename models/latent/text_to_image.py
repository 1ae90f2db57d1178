"""Published text-to-image models, LDM text2img-large and Stable Diffusion 1.x and 2.x, behind one adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.files.compvis import check_checkpoint, read_checkpoint
from models.files.diffusers_folder import PublishedModel, check_folder
from models.files.diffusers_parts import TextToImageParts, read_folder
from models.files.weights import is_weights_file
from models.latent.contract import PLACEHOLDER, LatentDiffusion
from utils.run.errors import ConfigError, WeightsError
from utils.training.ledger import counted
from utils.training.runtime import Runtime

LDM = PublishedModel("source", "text-to-image model", "CompVis/ldm-text2im-large-256", file="model.ckpt")


@dataclass(frozen=True)
class Placement:
    """Where frozen weights lie, and in which number format."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, runtime: Runtime, precision: str) -> Placement:
        """Return the run's device, with "fp32", "bf16" or, for "auto", the run's own number format."""
        bf16 = runtime.bf16 if precision == "auto" else precision == "bf16"
        return cls(runtime.device, torch.bfloat16 if bf16 else torch.float32)


ON_CPU = Placement()


class TextToImage(LatentDiffusion):
    """Text encoder, UNet and VAE of a published model, frozen.

    A class is one vector in the place of the placeholder's row of the text encoder's token embedding, before
    positions and the transformer (textual inversion, Gal et al., ICLR 2023, arXiv:2208.01618). Nothing
    is added to the vocabulary, so that one placeholder serves any number of classes in a batch.

    Args:
        parts: as `read_folder` or `read_checkpoint` gave them; they are moved, not copied.
        image_size: in pixels; null: what the model was trained at.
        placement: of the frozen weights; vectors and results are float32 in any case.

    Raises:
        ConfigError: if the VAE cannot take the image size.
        WeightsError: if the tokenizer has no word for the placeholder.
    """

    def __init__(self, parts: TextToImageParts, image_size: int | None = None, placement: Placement = ON_CPU):
        super().__init__()
        self.device, self.dtype, self.schedule = torch.device(placement.device), placement.dtype, dict(parts.schedule)
        self.image_size = image_size or parts.latent_side * parts.vae_factor
        if self.image_size % parts.vae_factor:
            raise ConfigError(f"image_size={self.image_size}: this model needs a multiple of {parts.vae_factor} pixels")
        side = self.image_size // parts.vae_factor
        self.latent_shape = (parts.unet.config.in_channels, side, side)
        self.image_channels = parts.vae.config.in_channels
        self.vae, self.text_encoder, self.unet = parts.vae, parts.text_encoder, parts.unet
        # Of the weights as they came, so that a model is itself in every number format.
        self._fingerprint = super().fingerprint()
        # In train mode the LDM text encoder would drop a tenth of its activations, and no context would be the same.
        self.to(self.device, self.dtype).freeze()
        self.tokenizer = parts.tokenizer
        self.max_tokens: int = self.text_encoder.config.max_position_embeddings
        self.vector_size: int = self.text_encoder.get_input_embeddings().embedding_dim
        tokens, self.placeholder = self._read_word(PLACEHOLDER)
        if self.placeholder is None:
            remedy = "it must be one word of the vocabulary: use the tokenizer that the text encoder was trained with"
            raise WeightsError(f"this model's tokenizer reads {PLACEHOLDER!r} as {tokens}, but {remedy}")

    def initial_vector(self, word: str) -> Tensor:
        tokens, number = self._read_word(word)
        if number is None:
            remedy = "a class starts from one token of the vocabulary: choose a plain, common word such as 'sculpture'"
            raise ConfigError(f"the model reads the word {word!r} as {', '.join(tokens)}, but {remedy}")
        return self.text_encoder.get_input_embeddings().weight[number].float().clone()

    @counted
    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(self.take(images)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float() * self.vae.config.scaling_factor

    @counted
    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(self.take(latents / self.vae.config.scaling_factor)).sample.float()

    def context(self, prompts: list[str], vectors: Tensor | None = None) -> Tensor:
        # No attention mask: these models were trained with an encoder that sees the padding.
        length = {"padding": "max_length", "truncation": True, "max_length": self.max_tokens}
        ids = self.tokenizer(prompts, **length, return_tensors="pt").input_ids.to(self.device)  # (B, max_tokens)
        if vectors is None:
            return self._encode(ids)
        here = ids == self.placeholder
        for prompt, count in zip(prompts, here.sum(1).tolist()):
            if prompt and count != 1:
                wanted = f"exactly once, as a word of its own among the first {self.max_tokens - 2}"
                raise ConfigError(f"the prompt {prompt!r} has {count} placeholders: it needs {PLACEHOLDER!r} {wanted}")

        def put_in(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            """Give row b of the vectors in the place of the placeholder's embedding."""
            return torch.where(here[:, :, None], vectors[:, None].to(output), output)

        with self.text_encoder.get_input_embeddings().register_forward_hook(put_in):
            return self._encode(ids)

    @counted
    def predict(self, zt: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(self.take(zt), t.to(self.device), self.take(context), return_dict=False)[0].float()

    def fingerprint(self) -> str:
        return self._fingerprint

    def take(self, tensor: Tensor) -> Tensor:
        """Return the tensor where the weights lie, in their number format."""
        return tensor.to(self.device, self.dtype)

    # ------------------------------------------------------------------ inside

    def _encode(self, ids: Tensor) -> Tensor:
        return self.text_encoder(input_ids=ids, return_dict=True)[0].float()  # (B, max_tokens, width)

    def _read_word(self, word: str) -> tuple[list[str], int | None]:
        """Return a word's tokens, and the number of its token where it is exactly one that the vocabulary knows."""
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        known = len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id
        return self.tokenizer.convert_ids_to_tokens(ids), ids[0] if known else None


def check_text_to_image(source: str, yaml: str | None, tokenizer: str, offline: bool, key: str = "source") -> None:
    """See that a model is here or may be fetched, without reading its weights; arguments as below.

    Raises:
        WeightsError: for weights, a folder or a tokenizer that are absent or incomplete.
        ConfigError: for a YAML that is absent or no description of a latent diffusion model.
    """
    if is_weights_file(source):
        check_checkpoint(source, yaml, tokenizer, offline, key)
    else:
        check_folder(source, offline, replace(LDM, key=key))


def load_text_to_image(
    source: str, yaml: str | None = None, tokenizer: str = "bert-base-uncased", *, image_size: int | None = None,
    placement: Placement = ON_CPU, offline: bool = False, key: str = "source",
) -> TextToImage:  # fmt: skip
    """Load a published model.

    Args:
        source: a hub id, a folder with model_index.json, or a checkpoint file of CompVis' latent diffusion.
        yaml: CompVis YAML of a checkpoint file.
        tokenizer: folder or hub id of the BERT tokenizer that goes with a checkpoint file.
        image_size, placement: see `TextToImage`.
        offline: fetch nothing; what is absent is an error.
        key: what the user calls ``source``, for messages.

    Raises:
        WeightsError: if weights are absent, incomplete, foreign or do not fit.
        ConfigError: if the YAML is wrong or contradicts the checkpoint.
    """
    check_text_to_image(source, yaml, tokenizer, offline, key)
    if is_weights_file(source):
        return TextToImage(read_checkpoint(source, yaml, tokenizer, offline), image_size, placement)
    return TextToImage(read_folder(source, offline, replace(LDM, key=key)), image_size, placement)
