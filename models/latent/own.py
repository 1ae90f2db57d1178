"""Generators of our own: networks that are trained here, in a folder of two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models.config import NetworkConfig
from models.files.weights import load_exactly, read_weights
from models.frozen import FrozenModel
from utils.run.errors import ConfigError, WeightsError
from utils.run.files import save_tensors, write_json

CONFIG, WEIGHTS = "model.json", "model.safetensors"


class OwnModel(FrozenModel):
    """A network that is made with random weights, trained, frozen and kept.

    Its constructor takes what the data say, by name, and a ``config`` of the class `Config`.

    Attributes:
        config: hyperparameters.
        data: the constructor's other arguments, as JSON has them.
    """

    Config: type[NetworkConfig]

    def __init__(self, config: NetworkConfig, **data: Any):
        super().__init__()
        self.config, self.data = config, data

    def save(self, directory: str | Path) -> None:
        """Write the weights, and what it takes to build the network again."""
        save_tensors(Path(directory) / WEIGHTS, self.state_dict())
        write_json(Path(directory) / CONFIG, {**self.data, **self.config.model_dump(mode="json")})

    @classmethod
    def load(cls, directory: str | Path, remedy: str = "name a folder that it was saved in"):
        """Return a frozen model from what ``save`` wrote.

        Args:
            directory: that holds both files.
            remedy: what the user may do if it holds none, for the message.

        Raises:
            WeightsError: if the folder holds none, or its files are damaged or do not fit each other.
        """
        path = Path(directory) / WEIGHTS
        try:
            path.stat()
            content = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
            own = {key: content.pop(key) for key in cls.Config.model_fields if key in content}
            model = cls(config=cls.Config.parse(own), **content)
        # torch and diffusers refuse sizes that make no network in many ways.
        except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, ConfigError) as error:
            raise WeightsError(f"{str(directory)!r} holds no {cls.__name__} ({error}): {remedy}") from error
        load_exactly(model, read_weights(path), path, f"the {CONFIG} beside it", "Train it again, or fetch both files")
        return model.freeze()
