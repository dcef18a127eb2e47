"""Losses, advantages and KL as pure functions on tensors, shapes in the docstrings."""
