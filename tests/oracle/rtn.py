"""Round to nearest on uniform grids with a scale and a zero point per row and group of columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Decisions closer than this (in steps of their grid) may go either way in float32.
NEAR = 1e-4


@dataclass
class Rounded:
    """Codes [out, in], scales and zero points [out, groups], values [out, in], and rows with a decision too close."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    values: np.ndarray
    close: np.ndarray


class Grids:
    """Grids of all groups: the range of the group with zero inside, the scale rounded to its stored dtype."""

    def __init__(self, shape: tuple[int, int], bits: int, group: int, scale_dtype: type = np.float32) -> None:
        out, inp = shape
        self.top, self.group, self.scale_dtype = 2**bits - 1, min(group, inp), scale_dtype
        groups = -(-inp // self.group)
        self.scale, self.zero = np.zeros((out, groups)), np.zeros((out, groups))
        self.codes, self.close = np.zeros(shape, dtype=np.int64), np.zeros(out, dtype=bool)

    def fit(self, index: int, values: np.ndarray) -> None:
        for row, numbers in enumerate(values):
            low, high = min(numbers.min(), 0.0), max(numbers.max(), 0.0)
            exact = (high - low) / self.top
            scale = float(self.scale_dtype(exact))
            self.scale[row, index] = scale
            self.zero[row, index] = np.clip(np.rint(-low / (scale or 1.0)), 0, self.top)
            # A change of the scale by a few float32 roundings must not round to another stored number.
            self.close[row] |= any(float(self.scale_dtype(exact * (1 + e))) != scale for e in (-3e-6, 3e-6)) and (
                self.scale_dtype is not np.float32
            )
            self.close[row] |= near_half(-low / (scale or 1.0), self.top)

    def round(self, values: np.ndarray, column: int) -> np.ndarray:
        """Codes and decoded values [out] of one column."""
        scale, zero = self.scale[:, column // self.group], self.zero[:, column // self.group]
        position = values / np.where(scale > 0, scale, 1) + zero
        self.codes[:, column] = np.clip(np.rint(position), 0, self.top)
        self.close |= np.array([near_half(p, self.top) for p in position])
        return (self.codes[:, column] - zero) * scale


def near_half(position: float, top: int) -> bool:
    """Whether a position on the grid 0..top lies almost exactly between two codes."""
    return bool(0 < position < top and abs(position - np.floor(position) - 0.5) < NEAR)


def rtn(weight: np.ndarray, bits: int, group: int, scale_dtype: type = np.float32) -> Rounded:
    """Round ``weight`` [out, in] to nearest."""
    grids = Grids((weight.shape[0], weight.shape[1]), bits, group, scale_dtype)
    weight, values = weight.astype(np.float64), np.zeros(weight.shape)
    for column in range(weight.shape[1]):
        if column % grids.group == 0:
            grids.fit(column // grids.group, weight[:, column : column + grids.group])
        values[:, column] = grids.round(weight[:, column], column)
    return Rounded(grids.codes, grids.scale, grids.zero, values, grids.close)
