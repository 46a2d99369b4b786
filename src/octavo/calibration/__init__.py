"""Calibration: text to token windows, and what the layers of a block see of them."""

from octavo.calibration.capture import Captured, collect, forward
from octavo.calibration.data import BUNDLED, EVALUATION, Tokens, overlap, read_text, windows

__all__ = ["BUNDLED", "EVALUATION", "Captured", "Tokens", "collect", "forward", "overlap", "read_text", "windows"]
