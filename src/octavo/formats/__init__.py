"""Checkpoints on disk: a checked reader, a durable writer, and the formats of quantized models on top of them."""

from octavo.formats._base import CONFIG_FILE, Format, Quantized, Shapes, Spec, Stored, get, registry
from octavo.formats.checkpoint import check, format_of, is_quantized, problems, raw_config, read_weights, verify
from octavo.formats.head import HeadLayout
from octavo.formats.manifest import MANIFEST_FILE, octavo_version, write_manifest
from octavo.formats.reader import CheckpointReader
from octavo.formats.writer import ShardWriter

__all__ = [
    "CONFIG_FILE",
    "MANIFEST_FILE",
    "CheckpointReader",
    "Format",
    "HeadLayout",
    "Quantized",
    "Shapes",
    "ShardWriter",
    "Spec",
    "Stored",
    "check",
    "format_of",
    "get",
    "is_quantized",
    "octavo_version",
    "problems",
    "raw_config",
    "read_weights",
    "registry",
    "verify",
    "write_manifest",
]
