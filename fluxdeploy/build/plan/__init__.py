"""What a build will take, and what it cannot do: worked out from headers, before any long work.

Nothing is written, and no weight is read.
"""

from fluxdeploy.build.plan.figures import (
    Beside,
    ComponentPlan,
    DiskPlan,
    Phase,
    Plan,
    RunMemory,
)
from fluxdeploy.build.plan.planner import make_plan

__all__ = [
    "Beside",
    "ComponentPlan",
    "DiskPlan",
    "Phase",
    "Plan",
    "RunMemory",
    "make_plan",
]
