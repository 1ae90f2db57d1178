"""Replay sources: what plays the past back. `synth/base.py` says what a source is."""

from typing import Any

from utils.run.config import SourceConfig
from utils.run.errors import ConfigError
from utils.run.registry import Registry

SOURCES: Registry = Registry("source", __name__)


def build_source_config(raw: Any) -> SourceConfig:
    """Build the checked Config of the source that `synth.name` picks."""
    if not isinstance(raw, dict) or "name" not in raw:
        names = ", ".join(SOURCES.names())
        raise ConfigError(f"synth={raw!r}: must be an object with a name, as in --set synth.name=ddpm; one of {names}")
    name = str(raw["name"]).lower()
    return SOURCES[name].Config.parse({**raw, "name": name}, where="synth.")
