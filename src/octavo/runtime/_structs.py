"""The structs of ``csrc/octavo_c.h`` for ctypes."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p


class Linear(ctypes.Structure):
    """``octavo_linear``."""

    _fields_ = (
        ("matrix", c_void_p),
        ("bfloat16", c_void_p),
        ("float32", c_void_p),
        ("bias", c_void_p),
        ("out", c_int64),
        ("in_", c_int64),
    )


class Block(ctypes.Structure):
    """``octavo_block``."""

    _fields_ = (
        *((name, c_void_p) for name in ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")),
        *((name, c_void_p) for name in ("query_norm", "key_norm")),
        *((name, Linear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        ("frequencies", c_void_p),
        ("rotary_factor", c_float),
        ("window", c_int64),
    )


class Decoder(ctypes.Structure):
    """``octavo_decoder``."""

    _fields_ = (
        *((name, c_int64) for name in ("blocks", "hidden", "heads", "key_heads", "head_width", "intermediate")),
        ("vocabulary", c_int64),
        ("block", ctypes.POINTER(Block)),
        ("final_norm", c_void_p),
        ("embedding", Linear),
        ("others", Linear),
        ("places", c_void_p),
        ("head", Linear),
        *((name, c_float) for name in ("epsilon", "attention_scale", "attention_cap", "logit_cap", "embedding_factor")),
        ("activation", c_int32),
    )
