"""DDDR: replay in batches of its own, distillation and supervised contrast."""

from learners.dddr.learner import DDDR as DDDR
