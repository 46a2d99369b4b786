"""Quantization methods: each turns a matrix (and its Hessian) into a VQWeight. One file per method."""

from octavo.algorithms._base import Algorithm, get, names, preset, registry

__all__ = ["Algorithm", "get", "names", "preset", "registry"]
