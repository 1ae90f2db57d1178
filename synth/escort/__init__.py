"""ESCORT: exemplars kept as edge maps, and drawn again along them."""

from synth.escort import words as words
from synth.escort.controlnet import ControlNetSource as ControlNetSource
from synth.escort.small_controlnet import SmallControlNetSource as SmallControlNetSource
