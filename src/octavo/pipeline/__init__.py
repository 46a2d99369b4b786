"""The main job: plan, quantize block by block with a resumable store, write the checkpoint."""

from octavo.pipeline.events import Event
from octavo.pipeline.plan import Plan, plan
from octavo.pipeline.run import Report, quantize

__all__ = ["Event", "Plan", "Report", "plan", "quantize"]
