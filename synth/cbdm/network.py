"""The UNet of DDPM that is told a class, and how its image was augmented: an adapter over ``UNet2DModel``."""

from __future__ import annotations

from torch import Tensor, nn

from synth.cbdm.augmentation import SIZE
from synth.ddpm.network import ClassUNetConfig
from utils.training.ledger import counted

TINY = 1e-5  # gain of the layers that end a branch: a new network predicts noise of about 0


class LabelUNet(nn.Module):
    """DDPM's UNet (Ho et al., 2020, arXiv:2006.11239) with a learned vector per class beside the time embedding.

    The network of class-balancing diffusion (Qin et al., 2023, arXiv:2305.00562): what is added to the time embedding
    is the vector of the class, nothing where there is none, and a linear view of the augmentation. diffusers lays the
    sines and cosines of a time step behind each other, the original in turn, which is a permutation of the columns of
    the first layer that reads them.

    Args:
        image_shape: (C, H, W) of the images; the side is halved between two levels.
        num_classes: K, all classes that will ever come.
        config: hyperparameters; without an ``attention_head_dim`` attention has one head.
        augmented: whether it is told how its images were augmented.

    Raises:
        ConfigError: if the shapes do not fit each other; the message says what would.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, config: ClassUNetConfig, augmented: bool):
        super().__init__()
        config.check(image_shape, num_classes=1)  # a vector per class asks for no place in the embedding
        self.unet = config.new_unet(image_shape, flip_sin_to_cos=False, freq_shift=0)
        width = 4 * config.block_out_channels[0]  # of the time embedding
        self.classes = nn.Embedding(num_classes, width)  # N(0, 1)
        self.augmentation = nn.Linear(SIZE, width, bias=False) if augmented else None
        _initialise(self)

    @counted
    def forward(self, xt: Tensor, t: Tensor, labels: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Predict the noise in ``xt``.

        Args:
            xt: noisy images, float (B, C, H, W), of unit scale.
            t: int64 (B,), steps of the unrespaced process (0..999).
            labels: int64 (B,), in [0, num_classes), or -1 for no class (the all-zero vector).
            augmentation: float (B, 9), see `synth.cbdm.augmentation`; None: the images are as they are.

        Returns:
            Noise, float (B, C, H, W).
        """
        embedding = self.classes(labels.clamp(min=0)) * (labels >= 0).unsqueeze(1)  # (B, 4 C)
        if augmentation is not None:
            embedding = embedding + self.augmentation(augmentation)
        return self.unet(xt, t, class_labels=embedding, return_dict=False)[0]


def _initialise(network: nn.Module) -> None:
    """Draw weights as the original does: Xavier's uniform, biases of 0, and nearly nothing where a branch ends.

    Its attention starts with a gain of 1, though its code asks for a tiny one: the block around it draws it anew.
    """
    from diffusers.models.resnet import ResnetBlock2D

    ends = [module.conv2 for module in network.modules() if isinstance(module, ResnetBlock2D)]
    ends.append(network.unet.conv_out)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight, gain=TINY if any(module is end for end in ends) else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
