"""Original models: where they come from, what is in them, and how they run one block at a time."""

from octavo.models.adapter import CausalModel, Target
from octavo.models.skeleton import BlockInputs
from octavo.models.source import ModelSource, resolve

__all__ = ["BlockInputs", "CausalModel", "ModelSource", "Target", "resolve"]
