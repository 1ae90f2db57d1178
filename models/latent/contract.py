"""What a latent diffusion model is, whoever built it: the contract between class inversion and foreign networks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from models.frozen import FrozenModel

# The noise of latent diffusion (Rombach et al., CVPR 2022, arXiv:2112.10752).
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLACEHOLDER = "*"  # stands in a prompt for the class vector; exactly one per prompt


class LatentDiffusion(FrozenModel, ABC):
    """A frozen latent diffusion model that draws what a vector tells it.

    It is in eval mode, no parameter requires a gradient, and it holds its own device and number format; every tensor
    that it takes may lie anywhere in float32, every one that it gives is float32 on its device. Gradients flow from
    ``predict`` and ``context`` back to ``vectors`` and nowhere else.

    Attributes:
        image_size (int): side of its images in pixels.
        image_channels (int): 1 or 3.
        latent_shape (tuple[int, int, int]): (c, h, w) of a latent.
        vector_size (int): D, length of the vector that stands for one class.
        schedule (dict[str, Any]): what diffusers' schedulers need to know of the noise: num_train_timesteps,
            beta_start, beta_end, beta_schedule, prediction_type ("epsilon" or "v_prediction"), and whatever else the
            model's own scheduler file says, such as timestep_spacing.
    """

    @abstractmethod
    def initial_vector(self, word: str) -> Tensor:
        """Return where the search for a class starts, float32 (D,): the input embedding of one word.

        Raises:
            ConfigError: if the word is not exactly one token of the vocabulary.
        """

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """Return mean and standard deviation of the images' latents, already scaled, (B, 2c, h, w).

        Args:
            images: float (B, C, S, S) in [-1, 1], S = ``image_size``.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents (B, c, h, w) into images (B, C, S, S), about [-1, 1]."""

    @abstractmethod
    def context(self, prompts: list[str], vectors: Tensor | None = None) -> Tensor:
        """Return what the noise predictor is told, (B, tokens, width).

        Args:
            prompts: B texts. With ``vectors`` each holds the placeholder once, except that "" stands for no class.
            vectors: (B, D), put in the place of the placeholder's input embedding; None: plain text.

        Raises:
            ConfigError: if a prompt that needs one has no placeholder or several, or if plain text is given to a model
                that reads none.
        """

    @abstractmethod
    def predict(self, zt: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Predict the noise, or the velocity (``schedule``), in noisy latents.

        Args:
            zt: (B, c, h, w), of unit scale.
            t: (B,), time steps; of a scheduler that has some between two whole ones they are no integers.
            context: of ``context``.

        Returns:
            (B, c, h, w).
        """
