"""Replay sources: what plays the past back. `synth/base.py` says what a source is."""

from utils.registry import Registry

SOURCES: Registry = Registry("source", __name__)
