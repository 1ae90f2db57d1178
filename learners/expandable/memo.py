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
    arXiv:2205.13218, with the keys of PyCIL's file. There ``convnet_type`` is written with the prefix ``memo_``, in
    PILOT's with the ending ``_memo``; both are accepted and dropped. ``t_max`` has no effect unless ``scheduler`` is
    cosine; ``debug`` and ``skip`` (start from a stored first task) have none.
    """

    class Config(DynamicallyExpandableRepresentation.Config):
        train_base: bool = Field(True, description="the trunk learns on after the first task")
        train_adaptive: bool = Field(False, description="the last stages of earlier tasks learn on, too")
        t_max: int | None = Field(None, ge=1, description="epochs until a later task's cosine is at 0, then it rises")

        @classmethod
        def translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
            name = str(raw.get("convnet_type") or "").lower().removeprefix("memo_").removesuffix("_memo")
            # PyCIL's and ESCORT's MEMO give this network the stem for photographs, however small the images are.
            stem = {"stem": "imagenet"} if name == "resnet18" and raw.get("stem") in (None, "auto") else {}
            return {**raw, "convnet_type": name or None, **stem}

    def build_network(self) -> ExpandableNet:
        whole = super().build_network()
        trunk, last_stage = split_last_stage(whole.backbone.branches[0])
        return ExpandableNet(trunk, last_stage, whole.head, self.config.train_base, self.config.train_adaptive).eval()

    def train_config(self, task: Task) -> TrainConfig:
        # In PyCIL the first task's cosine is as long as its training, whatever t_max says.
        return replace(super().train_config(task), cosine_length=self.config.t_max if task.num_old else None)
