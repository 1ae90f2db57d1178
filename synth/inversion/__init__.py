"""Class inversion: a frozen latent diffusion model, and one vector per class that tells it what to draw."""

from synth.inversion import words as words
from synth.inversion.ldm import LDM as LDM
from synth.inversion.small_ldm import SmallLDMSource as SmallLDMSource
