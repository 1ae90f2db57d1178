"""Replay sources: what plays the past back. `synth/base.py` says what a source is."""

from typing import Any

from utils.run.config import SourceConfig
from utils.run.errors import ConfigError
from utils.run.registry import Registry, shown

SOURCES: Registry = Registry("source", "synth.name", __name__)


def build_source_config(raw: Any) -> SourceConfig:
    """Build the checked Config of the source that `synth.name` picks."""
    if not isinstance(raw, dict) or "name" not in raw:
        must = "must be an object with a name, as in --set synth.name=ddpm"
        raise ConfigError(f"synth={shown(raw)}: {must}; one of {', '.join(SOURCES.names())}")
    name = str(raw["name"]).lower()
    config = SOURCES[name].Config
    try:
        return config.parse({**raw, "name": name}, where="synth.")
    except ConfigError as error:  # a key may be right and the source another one
        raise ConfigError(f"{error} (synth.name={name!r})") from error
