"""Experiment files as users of PyCIL, PILOT and the forks write them, and what is said of a mistake."""

import pytest
from pydantic import Field

from learners.run.configure import build_config
from synth import SOURCES
from utils.run.config import BaseConfig, RunConfig
from utils.run.errors import ConfigError
from utils.run.words import apply_overrides, parse_json, parse_yaml, read_experiment, translate


class Example(BaseConfig):
    rate: float = Field(0.1, gt=0, description="learning rate")
    epochs: int = Field(5, ge=1, description="passes over the data")
    flip: bool = False
    words: list[str] = ["a"]
    numbers: list[int] = [1]
    maybe: int | None = None


BASE = {"dataset": "digits", "init_cls": 2, "increment": 2, "model_name": "finetune"}
DDPM = {"name": "ddpm"}
STORED = {"syn_image_path": "bank", "need_syn_imgs": False}
SOURCES.names()  # the rooms register the words of their originals


def run_config(**changes) -> RunConfig:
    return RunConfig.parse({**BASE, **changes})


@pytest.mark.parametrize(
    ("key", "written", "read"),
    [
        ("rate", None, 0.1),  # null is the default
        ("rate", 1, 1.0),  # an integer is a number
        ("rate", "1e-3", 1e-3),  # numbers as text, as argparse leaves them
        ("epochs", "7", 7), ("epochs", 7.0, 7), ("maybe", "3", 3),
        ("flip", "true", True), ("flip", "False", False),
        ("words", "x", ["x"]), ("words", 101, ["101"]),  # a scalar fills a list; a number may be a name
        ("words", "x, y", ["x", "y"]),  # so does a comma string
        ("numbers", 4, [4]), ("numbers", "4,5", [4, 5]), ("numbers", ["4", 5], [4, 5]), ("numbers", [], []),
    ],
)  # fmt: skip
def test_values_are_read_as_pycils_users_write_them(key, written, read):
    value = getattr(Example.parse({key: written}), key)
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize(
    ("key", "written", "said"),
    [
        ("epochs", True, "a boolean is not a number"), ("numbers", [1, False], "a boolean is not a number"),
        ("rate", True, "a boolean is not a number"), ("flip", 1, "true or false"),
        ("epochs", 0, "greater than or equal to 1"), ("rate", 0.0, "greater than 0"),
        ("rate", float("nan"), "finite"), ("rate", float("inf"), "finite"),
        ("epochs", 2.5, "integer"), ("epochs", "many", "integer"), ("numbers", "4,five", "integer"),
        ("epochs", "1_0", "digits alone"), ("rate", "1_0", "digits alone"),  # Python would read 10
        ("epochs", 2**32, "below 4294967296"), ("rate", "1e300", "below 4294967296"), ("rate", "nan", "greater than 0"),
        ("words", [float("nan")], "finite"), ("words", ["a\0"], "NUL"), ("words", ["a\ud800"], "surrogates"),
        ("words", [[[[[[[[[[[]]]]]]]]]]], "8 levels"), ("words", ["x" * 2001], "at most 2000"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_key_value_and_what_is_allowed(key, written, said):
    with pytest.raises(ConfigError, match=said) as caught:
        Example.parse({key: written})
    assert str(caught.value).startswith(key)
    shown = "five" if key == "numbers" and isinstance(written, str) else str(written)
    assert shown in str(caught.value) or isinstance(written, list)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError, match=r"rate=-1.*; epochs=0.*; unknown key 'epoch'; did you mean 'epochs'"):
        Example.parse({"rate": -1, "epochs": 0, "epoch": 1})


@pytest.mark.parametrize(
    ("key", "hint"), [("epoch", "; did you mean 'epochs'?"), ("numbrs", "; did you mean 'numbers'?"), ("zzz", "")]
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(key, hint):
    with pytest.raises(ConfigError) as caught:
        Example.parse({key: 1})
    assert str(caught.value) == f"unknown key {key!r}{hint}"


def test_a_config_cannot_be_changed_and_every_key_has_a_one_line_description():
    with pytest.raises(Exception, match="frozen"):
        Example().rate = 1.0
    texts = [field.description or "" for field in RunConfig.model_fields.values()]
    assert all(text and "\n" not in text for text in texts)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{\n "dataset": "digits",\n "init_cls" 2\n}', r"file\.json: .*line 3 column 13"),
        (b"[1]", r"file\.json must hold .* one object, not a list"),
        (b"", r"file\.json: .*line 1"),
        (b"\xff", r"cannot read .*file\.json"),
        (b'{"a": "\xe4"}', r"file\.json: .*save it as UTF-8"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice"),
        (b'{"synth": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        (b"[" * 100_000, r"file\.json: .*recursion.*leave lists and objects out that lie so deep"),
        (None, r"no experiment file .*file\.json"),
    ],
)
def test_a_file_that_holds_no_object_is_named_with_its_mistake(tmp_path, content, said):
    if content is not None:
        (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_experiment(tmp_path / "file.json")


@pytest.mark.parametrize(
    ("text", "value"), [("85e-5", 85e-5), ("1e-4", 1e-4), ("-1.5e+3", -1500.0), ("1e", "1e"), ("e5", "e5"), ("5", 5)]
)
def test_numbers_of_a_yaml_are_those_that_omegaconf_reads(text, value):
    assert parse_yaml(f"rate: {text}") == {"rate": value}


def test_a_key_that_stands_twice_in_a_yaml_is_named():
    with pytest.raises(ValueError, match="the key 'sample_steps' stands twice"):
        parse_yaml("reprise:\n synth: {name: ldm, sample_steps: 5, sample_steps: 9}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_file_may_be_in_any_unicode_encoding(tmp_path, encoding):
    (tmp_path / "file.json").write_bytes('{"prefix": "ä"}'.encode(encoding))
    assert read_experiment(tmp_path / "file.json") == {"prefix": "ä"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["a=2"], {"a": 2, "synth": {"name": "x"}}),
        (["a=2", "a=3"], {"a": 3, "synth": {"name": "x"}}),  # the last one counts
        (["b=1e-3", "c=[1, 2]"], {"a": 1, "b": 1e-3, "c": [1, 2], "synth": {"name": "x"}}),
        (["a=0,1"], {"a": "0,1", "synth": {"name": "x"}}),  # no JSON: text
        (["a=k=v"], {"a": "k=v", "synth": {"name": "x"}}),  # the first sign counts
        (["synth.steps=5", "synth.name=y"], {"a": 1, "synth": {"name": "y", "steps": 5}}),  # dots reach inside
        (["new.deep.key=true"], {"a": 1, "synth": {"name": "x"}, "new": {"deep": {"key": True}}}),
        (["synth=null"], {"a": 1, "synth": None}),
    ],
)
def test_overrides_are_put_in_one_after_the_other(overrides, expected):
    raw = {"a": 1, "synth": {"name": "x"}}
    assert apply_overrides(raw, overrides) == expected
    assert raw == {"a": 1, "synth": {"name": "x"}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        *((text, "write --set key=value") for text in ("a", "=3", "")),
        ('a={"b": 1, "b": 2}', "'b' stands twice"), ("a=" + "[" * 100_000, r"--set 'a=\[\[.*recursion"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_read_is_an_error(override, said):
    with pytest.raises(ConfigError, match=said):
        apply_overrides({}, [override])


@pytest.mark.parametrize("key", ["backbone_type", "convnet_type"])
@pytest.mark.parametrize("override", ["backbone_type", "convnet_type"])
def test_pilots_backbone_type_is_convnet_type_in_file_and_override(key, override):
    assert translate({key: "resnet20"}) == {"convnet_type": "resnet20"}
    assert translate(apply_overrides({key: "resnet20"}, [f"{override}=vit"])) == {"convnet_type": "vit"}


def test_two_spellings_of_one_key_must_agree():
    for theirs, ours in (("a", "a"), (None, "a"), ("a", None)):
        assert translate({"backbone_type": theirs, "convnet_type": ours}) == {"convnet_type": "a"}
    with pytest.raises(ConfigError, match="are one key"):
        translate({"backbone_type": "a", "convnet_type": "b"})


@pytest.mark.parametrize(
    ("flat", "synth"),
    [
        ({"need_syn_imgs": True}, {"name": "ldm", "need_syn_imgs": True}),
        ({"need_syn_imgs": "true"}, {"name": "ldm", "need_syn_imgs": "true"}),
        ({"ldm_ckpt": "a.ckpt", "config": "a.yaml"}, {"name": "ldm", "ldm_ckpt": "a.ckpt", "yaml": "a.yaml"}),
        (STORED, {"name": "ldm", **STORED}),
        ({"need_syn_imgs": True, "syn_image_path": None}, {"name": "ldm", "need_syn_imgs": True}),
        ({"need_syn_imgs": False}, None),  # no images wanted, none named
        ({"need_syn_imgs": "false"}, None),
        ({"syn_image_path": None, "config": None}, None),
        ({"ldm_ckpt": "a", "synth": {"guidance": 3}}, {"name": "ldm", "guidance": 3, "ldm_ckpt": "a"}),
        ({"ldm_ckpt": "a", "synth": {"name": "LDM", "ldm_ckpt": "a"}}, {"name": "LDM", "ldm_ckpt": "a"}),  # they agree
        ({"need_syn_imgs": True, "synth": {"need_syn_imgs": "true"}}, {"name": "ldm", "need_syn_imgs": True}),
        ({"need_syn_imgs": False, "synth": DDPM}, {"name": "ddpm", "need_syn_imgs": False}),  # every source has it
        ({"synth": DDPM}, DDPM),
    ],
)
def test_flat_keys_of_the_originals_move_into_a_source(flat, synth):
    moved = translate({"dataset": "digits", **flat})
    assert moved.get("synth") == synth
    assert synth is None or set(moved) == {"dataset", "synth"}


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"ldm_ckpt": "a", "synth": {"name": "ldm", "ldm_ckpt": "b"}}, ["ldm_ckpt='a'", "synth.ldm_ckpt='b'"]),
        ({"config": "a", "synth": {"name": "ldm", "yaml": "b"}}, ["config='a'", "synth.yaml='b'"]),
        ({"need_syn_imgs": True, "synth": {"need_syn_imgs": False}}, ["need_syn_imgs=T", "synth.need_syn_imgs=F"]),
        ({"ldm_ckpt": "a", "synth": DDPM}, ["ldm_ckpt='a'", "synth.name='ddpm'"]),
    ],
)
def test_a_flat_key_that_contradicts_the_source_is_named_with_what_it_contradicts(raw, named):
    with pytest.raises(ConfigError) as caught:
        translate(raw)
    assert all(words in str(caught.value) for words in named)


@pytest.mark.parametrize(
    ("raw", "overrides", "synth"),
    [
        ({"ldm_ckpt": "a"}, ["ldm_ckpt=b"], {"name": "ldm", "ldm_ckpt": "b"}),
        ({"ldm_ckpt": "a"}, ["synth.ldm_ckpt=b"], {"name": "ldm", "ldm_ckpt": "b"}),
        ({"need_syn_imgs": "true"}, ["need_syn_imgs=false"], {"name": "ldm", "need_syn_imgs": False}),
        ({}, ["need_syn_imgs=true", "config=x.yaml"], {"name": "ldm", "need_syn_imgs": True, "yaml": "x.yaml"}),
        ({"synth": DDPM}, ["syn_image_path=x"], {"name": "ddpm", "syn_image_path": "x"}),
        ({"ldm_ckpt": "a"}, ["synth=null"], None),
    ],
)
def test_an_override_of_a_flat_key_wins_over_the_file_in_either_spelling(raw, overrides, synth):
    assert translate(apply_overrides(raw, overrides)).get("synth") == synth


ESCORT_OFF = {"augmentation_prob": 0.0, "augmentations_per_image": 1, "memory_per_class": 20, "real_per_class": 18,
              "syn_per_class": 0}  # fmt: skip


def test_escorts_method_can_be_switched_on_over_its_own_file():
    def read(*overrides):
        return translate(apply_overrides(ESCORT_OFF, overrides))

    assert read() == {"memory_per_class": 18} and read("seed=[1]") == {"memory_per_class": 18, "seed": [1]}
    on = {**ESCORT_OFF, "name": "controlnet", "syn_per_class": 48}
    assert read("syn_per_class=48") == {"memory_per_class": on.pop("memory_per_class"), "synth": on}


def test_need_syn_imgs_written_as_text_is_a_boolean_of_the_source_and_unused_without_one():
    raws = ({"synth": DDPM}, {"synth": DDPM, "need_syn_imgs": "false"}, {"need_syn_imgs": "false"})
    usual, off, (without, unused) = (build_config({**BASE, **raw}) for raw in raws)
    assert usual[0].synth.need_syn_imgs is True and off[0].synth.need_syn_imgs is False
    assert (without.synth, unused) == (None, ["need_syn_imgs"])


@pytest.mark.parametrize(("dataset", "official"), [("cub", "cub_official"), ("CUB", "cub_official"), ("cars", "cars")])
def test_the_split_of_cub_picks_the_data_set(dataset, official):
    assert run_config(dataset=dataset).data_name == dataset
    assert run_config(dataset=dataset, cub_split="official").data_name == official


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"seed": [1, 2], "device": "cpu", "num_workers": 3}, True),
        ({"data_dir": "x", "output_dir": "y", "offline": True}, True),
        ({"init_cls": 3}, False), ({"precision": "fp32"}, False), ({"class_order_seed": 1}, False),
        ({"stem": "cifar"}, False), ({"synth": {**DDPM, "num_steps": 6}}, False),  # a source's own key
    ],
)  # fmt: skip
def test_every_key_but_place_machine_and_seed_is_part_of_the_identity(change, same):
    here, there = (build_config({**BASE, "synth": DDPM, **keys})[0] for keys in ({}, change))
    assert (here.identity() == there.identity()) is same
    assert (here.identity_hash() == there.identity_hash()) is same


@pytest.mark.parametrize(
    ("keys", "seeds"),  # of the class order (ESCORT's seed is that one) and of the training, and the folder's name
    [({}, (7, 7, "seed_7")), ({"class_order_seed": 3}, (3, 7, "seed_7")), ({"model_seed": 4}, (7, 4, "seed_7_4"))],
)
def test_seeds_of_class_order_and_training(keys, seeds):
    config = run_config(**keys)
    assert (config.order_seed(7), config.train_seed(7), config.seed_tag(7)) == seeds


def test_keys_that_only_another_learner_knows_may_hold_anything_and_are_listed_as_unused():
    config, unused = build_config({**BASE, "T": "hot", "lamda": 2, "debug": True, "init_epoch": 4})
    assert unused == ["T", "debug", "lamda"] and config.init_epoch == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": None}, "the key 'dataset' is missing"),
        *(({"dataset": name}, "give a name, not a path") for name in ("/data/cifar", "../cifar", "", ".hidden")),
        *(({"seed": seed}, r"seed\.\d=") for seed in (-1, 2**32, [1993, -5])),  # NumPy cannot take them
        ({"model_name": "zzzz"}, r"unknown learner 'zzzz'\. Known: .*finetune"),
        ({"model_name": None}, "'model_name' is missing: choose one of .*finetune"),
        ({"model_name": "generative_replay"}, 'needs a source: add "synth": .*one of .*ddpm'),  # nothing to replay
        *(({"synth": synth}, "synth=.*: must be an object with a name") for synth in ("ddpm", {"num_steps": 5})),
        ({"synth": {**DDPM, "num_steps": 0}}, "synth.num_steps=0: .*greater than or equal to 1"),
        ({"scheduler": "stepl"}, "scheduler='stepl': .*'steplr', 'cosine' or 'constant'"),
        ({"model_name": ["finetune"]}, "model_name: unknown learner .*did you mean 'finetune'"),
        ({"synth": {"name": 2}}, "synth.name: unknown source '2'"),
        ({"model_name": "joint", "synth": DDPM}, "synth.name and model_name: 'ddpm' makes images"),
        ({"synth": {**DDPM, "beta_start": 0.5}}, "synth.beta_start=0.5 is above synth.beta_end=0.02"),
        ({"synth": {**DDPM, "block_out_channels": [10**12]}}, "synth.block_out_channels.0=.*less than or equal to"),
        ({"backbone_weights": 10**12}, "backbone_weights=.*finite number below"),
        ({"init_lr": 1e308}, "init_lr=.*less than or equal to 100"),
        ({"milestones": [-1]}, "milestones.0=-1"),
        ({"init_cls": parse_json("9" * 5000)}, "init_cls=inf: use a finite number"),
        *(({"output_dir": name}, "output_dir=.*give a path") for name in ("", " ")),
        *(({key: "x" * 256}, f"{key}=") for key in ("output_dir", "init_from", "dataset", "prefix")),
        ({"x" * 10_000: 1}, "unknown key 'xxx"),
        ({"\ud800": 1}, "unknown key"),
        ({"": 1}, "unknown key ''"),
        ({"seed": ["a"] * 1000}, "seed.0='a'"),
        ({"backbone_args": {"a": [float("inf")]}}, "backbone_args=.*finite"),
    ],
)
def test_a_mistake_in_the_experiment_is_one_short_config_error(change, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build_config({**BASE, **change})
    assert len(str(caught.value)) < 1000


def test_learner_and_source_names_may_be_written_in_capitals():
    config, _ = build_config({**BASE, "model_name": "Generative_Replay", "synth": {"name": "DDPM"}})
    assert (config.model_name, config.synth.name) == ("generative_replay", "ddpm")


ESCORT = {
    **ESCORT_OFF, "dataset": "Food101", "init_cls": 51, "increment": 5, "memory_size": None, "fixed_memory": True,
    "shuffle": True, "model_name": "der", "convnet_type": "resnet18", "device": ["0", "1"], "seed": [1993],
    "model_seed": 1, "batch_size": 128, "num_workers": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", ["der", "icarl", "wa", "memo"])
def test_an_escort_file_without_generated_images_is_the_plain_learner_with_its_real_exemplars(name):
    config, unused = build_config({**ESCORT, "model_name": name})
    assert unused == [] and config.synth is None
    assert (config.memory_per_class, config.fixed_memory, config.model_seed) == (18, True, 1)
    assert (config.dataset, config.convnet_type) == ("Food101", "resnet18")


@pytest.mark.parametrize("name", ["controlnet", "small_controlnet"])
def test_escorts_keys_of_generated_images_are_those_of_its_source(name):
    given = {"augmentation_prob": 0.4, "augmentations_per_image": 5, "syn_per_class": 48}
    synth = None if name == "controlnet" else {"name": name}  # implied, or one that takes the same keys
    config, unused = build_config({**ESCORT, **given, "synth": synth})
    assert unused == [] and (config.synth.name, config.memory_per_class) == (name, 20)
    assert (config.synth.real_per_class, config.synth.syn_per_class) == (18, 48)
    assert (config.synth.augmentation_prob, config.synth.augmentations_per_image) == (0.4, 5)


def test_escorts_file_with_its_method_off_takes_any_other_source_and_with_it_on_none():
    config, unused = build_config({**ESCORT, "synth": DDPM})
    assert unused == [] and config.synth.name == "ddpm" and config.memory_per_class == 18
    with pytest.raises(ConfigError, match=r"augmentation_prob=0\.4 is of the source 'controlnet'"):
        build_config({**ESCORT, "augmentation_prob": 0.4, "synth": DDPM})


def test_an_asp_file_with_the_flat_keys_of_generated_replay_runs_unchanged():
    asp = {"model_name": "asp", "backbone_type": "pretrained_vit_b16_224_vpt", "vpt_type": "Deep", "top_k": 5}
    flat = {"need_syn_imgs": "true", "syn_image_path": None, "ldm_ckpt": "model.ckpt", "config": "ldm.yaml"}
    config, unused = build_config({**BASE, **asp, **flat})  # whole files of ASP: tests/parity/test_original_files.py
    source = config.synth
    assert unused == ["top_k"] and config.convnet_type == "pretrained_vit_b16_224_vpt"
    assert (source.name, source.need_syn_imgs, source.ldm_ckpt, source.yaml) == ("ldm", True, "model.ckpt", "ldm.yaml")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"class_order": [0, 1, 1]}, "class_order.*name every number from 0 on, each once"),
        ({"task_order": [0, 2]}, "task_order.*name every number from 0 on, each once"),
        ({"class_order": []}, "class_order.*name every number from 0 on, each once"),
        ({"class_order": [1, 2, 3]}, "class_order.*name every number from 0 on, each once"),
        ({"class_order": [1, 0], "class_order_seed": 1}, "class_order and class_order_seed both say"),
        ({"train_per_class": 0}, "train_per_class=0"),
    ],
)
def test_an_order_that_leaves_a_class_out_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        run_config(**keys)
