"""Mistakes that a user can make or repair. main.py prints them as one message and exits with their code."""


class RepriseError(Exception):
    """Base of all errors that name the thing, the value and the remedy."""

    exit_code = 2


class ConfigError(RepriseError):
    """A key, a name or a value in the experiment file that cannot be used."""


class DataError(RepriseError):
    """A data set that is absent, incomplete or broken."""

    def __str__(self) -> str:
        # What a worker raises, torch raises anew with the text of the worker's traceback, whose last words are ours.
        return super().__str__().rpartition("DataError: ")[2].strip()


class SealedDataError(RepriseError):
    """Real images of a past task were asked for."""


class WeightsError(RepriseError):
    """Weights that are absent, foreign or do not fit."""


class NotFittedError(RepriseError):
    """A replay source was asked for a class that it has not learned."""


class TrainingError(RepriseError):
    """A training that cannot go on, such as a loss that is not a number."""


class SeedError(RepriseError):
    """Seeds that failed in processes of their own, while others went on."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class CheckpointError(RepriseError):
    """A file of a run that is damaged or belongs to another run."""


class BankError(RepriseError):
    """A folder of replay images that does not fit the run."""
