"""From an experiment file to the frozen Config of its learner and its source."""

from __future__ import annotations

from typing import Any

from learners import LEARNERS
from learners.base import Learner
from synth import SOURCES, build_source_config
from synth.replay import replay_kind
from utils.run.config import RunConfig, SourceConfig
from utils.run.errors import ConfigError
from utils.run.words import apply_overrides, translate, unread_keys


def build_config(raw: dict[str, Any], overrides: list[str] = ()) -> tuple[RunConfig, list[str]]:
    """Build the checked Config of the learner that `model_name` picks, and list the keys that it does not use.

    A key that another registered learner knows is unused, so that one file serves several learners; a key that
    nobody knows is an error.

    Args:
        raw: keys of an experiment file, in whichever project's words.
        overrides: `key=value`, in any of these words.

    Raises:
        ConfigError: for an unknown learner, source or key, for a wrong value, and for a learner and a source that
            do not go together.
    """
    names = LEARNERS.names()
    SOURCES.names()  # every room registers its words
    raw = translate(apply_overrides(raw, list(overrides)))
    if raw.get("model_name") is None:
        raise ConfigError(f"the key 'model_name' is missing: choose one of {', '.join(names)}")
    raw["model_name"] = str(raw["model_name"]).lower()
    learner = LEARNERS[raw["model_name"]]
    raw, own = learner.Config.translate(raw), learner.Config.model_fields
    known = {key for name in names for key in LEARNERS[name].Config.model_fields}
    unused = sorted(((known | unread_keys()) - own.keys()) & raw.keys())
    used = {key: value for key, value in raw.items() if key not in unused}
    if used.get("synth") is not None:
        used["synth"] = build_source_config(used["synth"])
    config = learner.Config.build(used)
    if config.init_from is not None and not getattr(learner, "shares_first_task", False):
        able = ", ".join(name for name in names if getattr(LEARNERS[name], "shares_first_task", False))
        why = f"the learner {config.model_name!r} trains the first task in its own way"
        remedy = f"leave the key out, or choose model_name={able}"
        raise ConfigError(f"init_from={config.init_from!r}: {why} and cannot start from another's weights; {remedy}")
    if config.synth is not None:
        _check_source(learner, config, config.synth)
    elif learner.needs_source:
        remedy = f'add "synth": {{"name": one of {", ".join(SOURCES.names())}}}'
        raise ConfigError(f"model_name={config.model_name!r} needs a source: {remedy}")
    return config, unused


def _check_source(learner: type[Learner], config: RunConfig, synth: SourceConfig) -> None:
    if synth.syn_image_path is not None and len(config.seed) > 1:
        said = f"synth.syn_image_path={synth.syn_image_path!r} is one folder"
        remedy = "run one seed at a time, each with its own folder, or leave the key out"
        raise ConfigError(f"{said}, but {len(config.seed)} seeds draw different images: {remedy}")
    if synth.source_dir is not None and not synth.need_syn_imgs:
        why = "no source is used where need_syn_imgs=false"
        raise ConfigError(f"synth.source_dir={synth.source_dir!r}: {why}: keep one of the two")
    source = SOURCES[synth.name]
    if source.samples not in learner.accepts:
        can_use = f"it can use {' or '.join(sorted(learner.accepts))}" if learner.accepts else "it uses no source"
        pair = f"{synth.name!r} makes {source.samples}, which the learner {config.model_name!r} cannot replay"
        raise ConfigError(f"synth.name and model_name: {pair} ({can_use}): choose another source or another learner")
    kind, usual = replay_kind(config, source, learner.replay_kind), source.usual_replay
    kind.check(config, source)
    if usual is not None and not issubclass(kind, usual) and usual.serves(config):
        why = f"enters a training in a way of its own, and so does the learner {config.model_name!r}"
        raise ConfigError(f"synth.name={synth.name!r}, with its keys as they are, {why}: choose another learner")
