"""A class-conditional diffusion model in pixels that learns task after task."""

from synth.ddpm.source import DDPM as DDPM
