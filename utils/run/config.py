"""The keys of an experiment, in PyCIL's words, checked as a whole before any data is read.

The base class owns the keys of the run, the data, the memory and the network; every learner and every source adds
its own. `learners/run/configure.py` puts the pieces together.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from utils.run.errors import ConfigError
from utils.run.registry import nearest, shown

# Two settings that differ only in these are the same experiment; of a source_dir, each may hold other weights.
NOT_IDENTITY = ("seed", "device", "num_workers", "data_dir", "output_dir", "offline", "checkpoint_every", "init_from",
                "log_with", "evaluate_replay", "synth.keep_sources")  # fmt: skip
NUMBERS = {bool, int, float}

# Kinds of values that many keys have. Bounded is what would fail long after the start; what only takes long is not.
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy's legacy generator takes, which orders PyCIL's classes
Rate = Annotated[float, Field(gt=0, le=100)]  # of learning
Decay = Annotated[float, Field(ge=0, le=100)]  # of weights
Factor = Annotated[float, Field(ge=0, le=1e6)]  # of a term of a loss, of a gradient, of guidance
Milestones = list[Annotated[int, Field(ge=1)]]  # epochs
Softness = Annotated[float, Field(ge=1e-3, le=1e3)]  # divides logits
BatchSize = Annotated[int, Field(ge=1, le=2**20)]  # images at once
PerClass = Annotated[int, Field(ge=0, le=10**6)]  # images of a class
Width = Annotated[int, Field(ge=1, le=4096)]  # channels of a network
Side = Annotated[int, Field(ge=4, le=4096)]  # of an image, in pixels


def _require_place(value: str) -> str:
    """Refuse what no disk and no hub can hold."""
    if not value.strip():
        raise ValueError("give a path or a name, or leave the key out")
    if len(value) > 1000 or any(len(part.encode()) > 255 for part in Path(value).parts):
        raise ValueError("too long: use up to 1,000 characters, and up to 255 bytes between two slashes")
    return value


def _require_name(value: str) -> str:
    if not value.strip() or "/" in value or value.startswith(".") or len(value.encode()) > 255:
        raise ValueError("give a name, not a path, of up to 255 bytes; data_dir says where the folder lies")
    return value


def _require_once(value: list[int]) -> list[int]:
    if len(set(value)) < len(value):
        raise ValueError("a seed stands there twice; each gets one run")
    return value


def _require_order(value: list[int]) -> list[int]:
    if not value or sorted(value) != list(range(len(value))):
        raise ValueError("name every number from 0 on, each once")
    return value


Place = Annotated[str, AfterValidator(_require_place)]  # a file, a folder or an id on a hub
Name = Annotated[str, AfterValidator(_require_name)]  # of a data set
Seeds = Annotated[list[Seed], AfterValidator(_require_once)]
Order = Annotated[list[int], AfterValidator(_require_order)]


def _kinds(annotation: Any) -> set[type]:
    """Return the types that an annotation is made of, at any depth."""
    if not (members := get_args(annotation)):
        return {annotation} if isinstance(annotation, type) else set()
    return {get_origin(annotation)}.union(*map(_kinds, members))


def _require_plain(value: Any, depth: int = 0) -> None:
    """Raise ValueError for what no key can mean, wherever in its value it lies."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("use a finite number")
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise ValueError("NUL and halves of characters (surrogates) cannot be written to a file: leave them out")
    if depth > 8:
        raise ValueError("lists and objects lie too deep in each other: use up to 8 levels")
    for item in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_plain(item, depth + 1)


class BaseConfig(
    BaseModel, frozen=True, extra="forbid", validate_default=True, coerce_numbers_to_str=True, str_max_length=2000
):
    """A frozen set of keys that reads JSON as PyCIL's users write it."""

    @field_validator("*", mode="wrap")
    @classmethod
    def _read_as_written(cls, value: Any, read, info) -> Any:
        """Fill a list from a scalar or a comma string; take no boolean for a number, and no number beyond reason."""
        _require_plain(value)
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        if list in kinds and not isinstance(value, list) and value is not None:
            value = [item.strip() for item in value.split(",")] if isinstance(value, str) else [value]
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, (bool, int, float)) and isinstance(item, bool) != (bool in kinds) and kinds & NUMBERS:
                raise ValueError("a boolean is not a number" if isinstance(item, bool) else "use true or false")
            if isinstance(item, (int, float)) and not kinds & NUMBERS and not abs(item) < 2**32:
                raise ValueError(f"use a finite number below {2**32}")  # a text may be a number, such as a name
            if isinstance(item, str) and "_" in item and str not in kinds and kinds & NUMBERS:
                raise ValueError("write a number with digits alone")  # Python would read 1_0 as 10
        value = read(value)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, (int, float)) and not abs(item) < 2**32:  # nor is "nan", which was text above
                raise ValueError(f"use a finite number below {2**32}")
        return value

    @classmethod
    def translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Replace an original's words by ours; default: there are none."""
        return raw

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str = ""):
        """Build from a dictionary in whichever words; see ``build``."""
        return cls.build(cls.translate(raw), where)

    @classmethod
    def build(cls, raw: dict[str, Any], where: str = ""):
        """Build from a dictionary in our words; null means the default.

        Raises:
            ConfigError: for an unknown key (names the nearest known one), a missing key, or a wrong value (names
                key, value and what is allowed).
        """
        try:
            return cls.model_validate({key: value for key, value in raw.items() if value is not None})
        except ValidationError as error:
            # As many as a reader takes in: a list may hold a thousand mistakes.
            raise ConfigError("; ".join(cls._explain(where, item) for item in error.errors()[:5])) from error

    @classmethod
    def _explain(cls, where: str, item: dict[str, Any]) -> str:
        key = where + ".".join(str(part)[:80] for part in item["loc"])
        if item["type"] == "extra_forbidden":
            return f"unknown key {key!r}{nearest(item['loc'][-1], cls.model_fields)}"
        if item["type"] == "string_unicode":  # the key itself; values were looked at before
            return f"unknown key {shown(where + item['input'])}"
        if item["type"] == "missing":
            return f"the key {key!r} is missing"
        message = item["msg"].removeprefix("Value error, ")
        # A mistake of several keys together has no place; its message names them.
        return f"{key}={shown(item['input'])}: {message}" if item["loc"] else message

    def dump_without(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return all resolved keys but these, as JSON has them; dots reach into nested objects."""
        exclude: dict[str, Any] = {}
        for key in keys:
            outer, _, inner = key.partition(".")
            exclude[outer] = {*exclude.get(outer, ()), inner} if inner else True
        return self.model_dump(mode="json", exclude=exclude)


class SourceConfig(BaseConfig):
    """Keys of every replay source: the nested object `synth`.

    Attributes:
        shelves: keys of folders that a run fills and others may use; a plan leaves them alone.
        elsewhere: keys that say where samples lie or how many are asked for, and not what they look like.
        drawing: keys of a subclass that shape the drawing alone, in which runs that share learned weights may differ.
    """

    shelves: ClassVar[set[str]] = {"syn_image_path"}
    elsewhere: ClassVar[set[str]] = {"need_syn_imgs", "syn_image_path", "adopt_syn_images", "syn_per_class",
                                     "fit_after_last_task", "keep_sources", "source_dir"}  # fmt: skip
    drawing: ClassVar[set[str]] = set()

    name: str = Field(description="which source: see `python main.py --list`")
    replay: Literal["keep", "redraw"] = Field("keep", description="keep: draw a class once; redraw: all before a task")
    syn_per_class: PerClass | None = Field(None, ge=1, description="images per class; null: as many as real ones")
    need_syn_imgs: bool = Field(True, description="false: use the images that are there; fit and draw nothing")
    syn_image_path: Place | None = Field(None, description="folder of the images; null: syn_image_<run>_seed<seed>")
    adopt_syn_images: bool = Field(False, description="take over a folder of images that has no manifest")
    image_format: Literal["auto", "png", "jpg"] = Field("auto", description="auto: png up to 64 px, jpg above")
    sample_batch: BatchSize = Field(128, description="images drawn at once; a pixel may move by one grey level with it")
    fit_after_last_task: bool = Field(False, description="also fit the source on the last task, which nobody replays")
    keep_sources: bool = Field(False, description="keep it as it is after every task, in sources/task_<t>")
    source_dir: Place | None = Field(None, description="folder of kept sources to take; null: train")

    def sample_settings(self) -> dict[str, Any]:
        """Return the keys that shape a sample, as JSON."""
        return self.dump_without(self.elsewhere)

    def training_settings(self) -> dict[str, Any]:
        """Return the keys that shape what is learned, as JSON; what all sources share says nothing of it."""
        return self.dump_without({*SourceConfig.model_fields, *self.drawing})


class RunConfig(BaseConfig):
    """Keys of the run, the data, the memory and the network, shared by all learners.

    Attributes:
        shelves: keys of folders that a run fills and others may use; a plan leaves them alone.
    """

    shelves: ClassVar[set[str]] = set()

    prefix: str = Field("", max_length=100, description="free tag, first part of the run's name")
    model_name: str = Field(description="which learner: see `python main.py --list`")
    seed: Seeds = Field([1993], min_length=1, description="one full run per entry; also the class order's seed")
    class_order_seed: Seed | None = Field(None, description="seed of the class order alone; null: the seed")
    class_order: Order | None = Field(None, description="every original id, as they are learned; null: shuffle")
    task_order: Order | None = Field(None, description="the tasks that this order is cut into, as they are learned")
    model_seed: Seed | None = Field(None, description="if given, `seed` is the class order's and this the training's")
    device: list[int | str] = Field(["auto"], min_length=1, description='GPU ids, "cpu", -1 (the CPU) or "auto"')
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the device is fast at it")
    num_workers: int = Field(-1, ge=-1, le=256, description="processes that decode large images; -1: by the machine")
    checkpoint_every: int = Field(500, ge=1, description="training steps between two checkpoints inside a training")
    data_dir: Place = Field("data", description="where data sets lie")
    output_dir: Place = Field("outputs", description="where results go")
    offline: bool = Field(False, description="fetch nothing from a network")
    log_with: Literal["tensorboard", "wandb"] | None = Field(None, description="also send metrics to this tracker")

    dataset: Name = Field(description="a known data set or the name of a folder in data_dir")
    cub_split: Literal["asp80", "official"] = Field("asp80", description="of cub: class folders, or its own split")
    image_size: Side | None = Field(None, description="side in pixels, also of drawn images; null: the data set's")
    shuffle: bool = Field(True, description="permute the class order with the seed")
    init_cls: int = Field(ge=1, description="classes in the first task")
    increment: int = Field(ge=1, description="classes in every later task; the last one may be smaller")
    limit_tasks: int | None = Field(None, ge=1, description="learn so many tasks, as if there were no more; null: all")
    train_per_class: PerClass | None = Field(None, ge=1, description="use the first so many of a class; null: all")
    kshot: int = Field(0, ge=0, description="images per class after the first task; 0: all")
    few_shot_draw: Literal["own", "reference"] = Field("own", description="reference: as Liu et al. draw")
    imb_factor: float = Field(1.0, gt=0, le=1, description="smallest over largest class; 1: balanced")
    imb_type: Literal["exp", "step"] = Field("exp", description="shape of the long tail")
    val_share: float = Field(0.0, ge=0, lt=1, description="share of every class's training images held out")

    memory_size: int = Field(2000, ge=0, description="exemplars in all, shared by the seen classes")
    memory_per_class: PerClass = Field(20, description="exemplars per class, used when fixed_memory is true")
    fixed_memory: bool = Field(False, description="true: a fixed number per class; false: a fixed total")

    memory_budget_mb: float | None = Field(None, gt=0, description="10^6 bytes that a task may hand on; null: no limit")
    memory_drop: Literal["generated", "real"] = Field("generated", description="what memory_budget_mb takes away first")

    convnet_type: str = Field("resnet32", description="a backbone of ours or any timm model with its weight tag")
    stem: Literal["auto", "cifar", "imagenet", "imagenet_small"] = Field("auto", description="first layers of a ResNet")
    pretrained: bool = Field(True, description="load the weights that a timm name stands for")
    backbone_weights: Place | None = Field(None, description="a local weight file for the backbone")
    backbone_args: dict[str, Any] = Field({}, description="of a timm model from scratch or a local file: depth, ...")
    init_from: Place | None = Field(None, description="folder of a run or seed that gives the first task")
    replay_resize: Literal["bicubic", "bilinear", "nearest"] = Field("bicubic", description="of images in memory")

    synth: SerializeAsAny[SourceConfig] | None = Field(None, description="the replay source and its keys")
    evaluate_replay: bool = Field(False, description="at the end, measure what was replayed: `synth.evaluate`")

    @model_validator(mode="after")
    def _require_replay(self) -> RunConfig:
        if self.evaluate_replay and self.synth is None:
            raise ValueError("evaluate_replay=true, but nothing is replayed: add synth, or leave the key out")
        return self

    @model_validator(mode="after")
    def _require_one_order(self) -> RunConfig:
        if self.class_order is not None and self.class_order_seed is not None:
            raise ValueError("class_order and class_order_seed both say how the classes come: leave one of them out")
        return self

    @property
    def data_name(self) -> str:
        """Return the data set's name in `utils.data.datasets`: splits of one data set are data sets of their own."""
        return "cub_official" if self.dataset.lower() == "cub" and self.cub_split == "official" else self.dataset

    def identity(self) -> dict[str, Any]:
        """Return what makes two runs the same experiment: every resolved key that names no place and no machine."""
        return self.dump_without({*NOT_IDENTITY, *self.shelves})

    def identity_hash(self) -> str:
        """Return six hexadecimal digits of the identity."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:6]

    def order_seed(self, seed: int) -> int:
        """Return the seed of the class order in the run of this seed."""
        return seed if self.class_order_seed is None else self.class_order_seed

    def train_seed(self, seed: int) -> int:
        """Return the seed of weights, batches and replay in the run of this seed."""
        return seed if self.model_seed is None else self.model_seed

    def seed_tag(self, seed: int) -> str:
        """Return the name of this seed's folder; with a model_seed it carries both."""
        return f"seed_{seed}" if self.model_seed is None else f"seed_{seed}_{self.model_seed}"
