"""A diffusion model of a classifier's features, helped by features that are translated from large classes to small."""

from synth.features.source import FeatureDiffusion as FeatureDiffusion
