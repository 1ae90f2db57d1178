"""MEMO: early layers shared by all tasks, a last stage for each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from learners import LEARNERS
from learners.expandable.der import DynamicallyExpandableRepresentation
from learners.expandable.network import ExpandableNet, split_last_stage
from utils.data.manager import Task
from utils.training.schedule import TrainConfig


@LEARNERS.register("memo")
class MEMO(DynamicallyExpandableRepresentation):
    """DER with one trunk: only the last stage of a ResNet is made anew for every task, the layers before learn on.

    Zhou et al., "A Model or 603 Exemplars: Towards Memory-Efficient Class-Incremental Learning", ICLR 2023,
    arXiv:2205.13218, with the keys of PyCIL's file. There ``convnet_type`` is written with the prefix ``memo_``,
    which is accepted and dropped. ``t_max`` has no effect unless ``scheduler`` is cosine; ``debug`` and ``skip`` (start
    from a stored first task) have none.
    """

    class Config(DynamicallyExpandableRepresentation.Config):
        train_base: bool = Field(True, description="the trunk learns on after the first task")
        train_adaptive: bool = Field(False, description="the last stages of earlier tasks learn on, too")
        t_max: int | None = Field(None, ge=1, description="epochs until a cosine is at 0, to rise again; null: all")

        @classmethod
        def translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
            name = raw.get("convnet_type")
            return {**raw, "convnet_type": name.lower().removeprefix("memo_")} if isinstance(name, str) else raw

    def build_network(self) -> ExpandableNet:
        whole = super().build_network()
        trunk, last_stage = split_last_stage(whole.backbone.branches[0])
        return ExpandableNet(trunk, last_stage, whole.head, self.config.train_base, self.config.train_adaptive).eval()

    def train_config(self, task: Task) -> TrainConfig:
        return replace(super().train_config(task), cosine_length=self.config.t_max)
