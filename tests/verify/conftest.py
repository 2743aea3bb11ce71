"""A pipeline in memory, and builds that are real but for the tracing, to verify and to break."""

from tests.builds.conftest import checkpoints, traces
from tests.host.conftest import engines, make_pipeline, manifest, pipe
from tests.support.specs import latent_spec, rope_spec, schedule_spec

__all__ = [
    "checkpoints",
    "engines",
    "latent_spec",
    "make_pipeline",
    "manifest",
    "pipe",
    "rope_spec",
    "schedule_spec",
    "traces",
]
