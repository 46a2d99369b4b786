"""Ways to multiply by a quantized matrix. One file per kernel; :mod:`octavo.kernels.select` decides which one runs."""
