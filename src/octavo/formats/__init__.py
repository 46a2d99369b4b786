"""Checkpoints on disk: a checked reader, a durable writer, and Octavo's native format on top of them."""

from octavo.formats.reader import CheckpointReader
from octavo.formats.writer import ShardWriter

__all__ = ["CheckpointReader", "ShardWriter"]
