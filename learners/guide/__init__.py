"""GUIDE: replay drawn inside the training step, bent by the classifier that is being trained."""

from learners.guide.joint import GUIDEJoint as GUIDEJoint
from learners.guide.learner import GUIDE as GUIDE
