"""Learners whose network gains a branch with every task: DER and MEMO."""

from learners.expandable.der import DynamicallyExpandableRepresentation as DynamicallyExpandableRepresentation
from learners.expandable.memo import MEMO as MEMO
