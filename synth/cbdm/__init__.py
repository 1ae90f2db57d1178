"""A diffusion model for long-tailed data, balanced by its loss, and images of its own that fill the tail."""

from synth.cbdm import words as words
from synth.cbdm.source import ClassBalancing as ClassBalancing
