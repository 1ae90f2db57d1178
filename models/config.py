"""The hyperparameters of a network of our own, said once, beside its class."""

from __future__ import annotations

from utils.run.config import BaseConfig
from utils.run.errors import ConfigError


class NetworkConfig(BaseConfig):
    """A frozen set of sizes from which one network is built.

    The config of whoever trains the network inherits these fields; `of` cuts them out of it again.
    """

    @classmethod
    def of(cls, config: BaseConfig, **changes):
        """Return the network's own fields of a larger config, some of them with other values."""
        return cls(**{key: getattr(config, key) for key in cls.model_fields} | changes)

    def require_multiples(self, key: str, of: str) -> None:
        """Raise ConfigError unless all values of one key are multiples of the value of another."""
        given, factor = getattr(self, key), getattr(self, of)
        for value in given if isinstance(given, list) else [given]:
            if value % factor:
                raise ConfigError(f"{key}={given}: {value} is not a multiple of {of}={factor}")

    def require_side(self, side: int, *keys: str) -> None:
        """Raise ConfigError unless an image can be halved between the levels whose widths these keys list."""
        halvings = sum(max(len(getattr(self, key)) - 1, 0) for key in keys)
        if side % 2**halvings:
            levels = " and ".join(f"{len(getattr(self, key))} {key}" for key in keys)
            wanted = f"its side must be a multiple of {2**halvings}, not {side}: give fewer of them"
            raise ConfigError(f"{levels} halve an image {halvings} times, so {wanted}")

    def require_levels(self, key: str, num_levels: int) -> None:
        """Raise ConfigError if a key names levels of a UNet that it does not have."""
        if absent := [level for level in getattr(self, key) if not 0 <= level < num_levels]:
            raise ConfigError(f"{key}={absent} do not exist: levels are 0 to {num_levels - 1}")
