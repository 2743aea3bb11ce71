"""FLUX.1-dev's constants."""

from tests.support.specs import latent_spec, rope_spec, schedule_spec

__all__ = ["latent_spec", "rope_spec", "schedule_spec"]
