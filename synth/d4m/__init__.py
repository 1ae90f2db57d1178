"""D4M: data sets distilled into a few images per class, which stand for the present, the past, or both."""

from synth.d4m.source import D4M as D4M
from synth.d4m.source import SmallD4M as SmallD4M
