"""What the trainer knows of JAM-Cross: a language model of two towers, see `LmTask`."""

from __future__ import annotations

from megamug.models.jam.cross import JamCross
from megamug.models.jam.plan import JamPlan
from megamug.models.language.task import LmTask


class JamTask(LmTask):
    """Of `jam_cross`."""

    plan_type, model = JamPlan, JamCross
