"""From an experiment file to the frozen Config of its learner and its source."""

from __future__ import annotations

from typing import Any

from learners import LEARNERS
from synth import SOURCES, build_source_config
from synth.ddpm.words import IDLE
from utils.run.config import RunConfig
from utils.run.errors import ConfigError
from utils.run.registry import nearest
from utils.run.words import DEAD_KEYS, SOURCE_KEYS, merge_aliases


def build_config(raw: dict[str, Any]) -> tuple[RunConfig, list[str]]:
    """The checked Config of the learner that `model_name` picks, and the keys that it does not use.

    A key that another registered learner knows is unused, so that one file serves several learners; a key that
    nobody knows is an error.

    Raises:
        ConfigError: for an unknown learner, source or key, for a wrong value, and for a learner and a source that
            do not go together.
    """
    raw = merge_aliases(raw)
    name = raw.get("model_name")
    if name is None:
        raise ConfigError(f"the key 'model_name' is missing: choose one of {', '.join(LEARNERS.names())}")
    learner = LEARNERS[str(name).lower()]
    raw = learner.Config.translate({**raw, "model_name": str(name).lower()})
    known_elsewhere = {key for other in LEARNERS.names() for key in LEARNERS[other].Config.model_fields}
    unread = {*known_elsewhere, *DEAD_KEYS, *IDLE, *SOURCE_KEYS} - set(learner.Config.model_fields)
    unused = sorted(unread & raw.keys())
    used = {key: value for key, value in raw.items() if key not in unused}
    for key in used:
        if key not in learner.Config.model_fields:
            raise ConfigError(f"unknown key {key!r}{nearest(key, known_elsewhere)}")
    if used.get("synth") is not None:
        used["synth"] = build_source_config(used["synth"])
    config = learner.Config.parse(used)
    _check_pair(learner, config)
    return config, unused


def _check_pair(learner: type, config: RunConfig) -> None:
    if config.synth is None:
        if learner.needs_source:
            raise ConfigError(
                f"the learner {config.model_name!r} replays generated images and needs a source: add "
                f'"synth": {{"name": ...}} with one of {", ".join(SOURCES.names())}'
            )
        return
    if config.synth.syn_image_path is not None and len(config.seed) > 1:
        raise ConfigError(
            f"synth.syn_image_path={config.synth.syn_image_path!r} is one folder, but {len(config.seed)} seeds draw "
            "different images: run one seed at a time, each with its own folder, or leave the key out"
        )
    if config.synth.source_dir is not None and not config.synth.need_syn_imgs:
        raise ConfigError(
            f"synth.source_dir={config.synth.source_dir!r}: with need_syn_imgs=false the images are there and no "
            "source is used; keep one of the two"
        )
    if learner.guides and not SOURCES[config.synth.name].can_be_guided:
        able = ", ".join(name for name in SOURCES.names() if SOURCES[name].can_be_guided)
        raise ConfigError(
            f"the learner {config.model_name!r} guides the denoising of its source, which {config.synth.name!r} does "
            f"not allow: choose synth.name={able}"
        )
    kind = SOURCES[config.synth.name].kind
    if kind not in learner.accepts:
        can_use = f"it can use {' or '.join(sorted(learner.accepts))}" if learner.accepts else "it uses no source"
        raise ConfigError(
            f"the source {config.synth.name!r} makes {kind}, which the learner {config.model_name!r} cannot replay "
            f"({can_use}): choose another source or another learner"
        )
