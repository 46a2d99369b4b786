"""Foundations without any knowledge of quantization: errors, registry, atomic I/O, seeds, the C library."""
