"""Nodes that share a limit."""

from __future__ import annotations

from dataclasses import dataclass, field

from blockd.objects.limits import ThrottleLimits
from blockd.objects.pace import Pace
from blockd.objects.registry import UserObject


@dataclass(slots=True, eq=False)
class ThrottleGroup(UserObject):
    """Its nodes together keep to ``limits``, by way of ``pace``."""

    limits: ThrottleLimits
    pace: Pace = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.pace = Pace(self.limits)
