"""Numerical building blocks: pure functions of tensors, device of the inputs, randomness passed in."""
