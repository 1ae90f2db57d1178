"""One short file per method; `learners/base.py` holds the life of a task."""

from utils.run.registry import Registry

LEARNERS: Registry = Registry("learner", "model_name", __name__)
