"""Generators of our own: a network that knows the arguments it was made with, in a folder of two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from models.files.weights import load_exactly, read_weights
from utils.run.errors import WeightsError
from utils.run.files import save_tensors, write_json
from utils.training import seeding

CONFIG, WEIGHTS = "model.json", "model.safetensors"


class OwnModel(nn.Module):
    """A network that is made with random weights, trained, frozen and kept.

    Attributes:
        arguments: of its class, as JSON.
        source: the replay source that trains it.
    """

    arguments: dict[str, Any]
    source: str

    def freeze(self) -> OwnModel:
        """Eval mode, no gradients."""
        return self.eval().requires_grad_(False)

    def fingerprint(self) -> str:
        """SHA-256 over all weights."""
        return seeding.hash_tensors(self.state_dict())

    def frozen_bytes(self) -> int:
        """Bytes of all weights as they lie in memory."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def save(self, directory: Path) -> None:
        """Weights and arguments."""
        save_tensors(Path(directory) / WEIGHTS, self.state_dict())
        write_json(Path(directory) / CONFIG, self.arguments)

    @classmethod
    def load(cls, directory: str | Path) -> OwnModel:
        """A frozen model from what ``save`` wrote.

        Raises:
            WeightsError: if the folder holds none, or its files do not fit each other.
        """
        path = Path(directory) / WEIGHTS
        try:
            path.stat()
            model = cls(**json.loads((Path(directory) / CONFIG).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise WeightsError(
                f"{str(directory)!r} holds no model of the source {cls.source!r} ({error}): name a folder that "
                "`python -m synth.train` wrote with this source"
            ) from error
        load_exactly(model, read_weights(path), path, f"the {CONFIG} beside it", "Train it again, or fetch both files")
        return model.freeze()
