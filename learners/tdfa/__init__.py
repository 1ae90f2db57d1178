"""TDFA: a tail that is filled by translated and by generated features, and a head that is trained anew on them."""

from learners.tdfa.learner import TDFA as TDFA
