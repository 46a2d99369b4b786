"""Running a quantized model outside transformers: one call of the C++ library per token."""
