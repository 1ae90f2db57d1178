"""Networks only: no data, no config files, no training."""

from utils.run.registry import Registry

BACKBONES: Registry = Registry("backbone", "convnet_type", __name__)
