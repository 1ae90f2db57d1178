"""Pixels and tasks: what is learned, in which order, and how images become batches."""
