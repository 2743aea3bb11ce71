"""A small bundle, whole and valid, for tests that break it."""

from tests.support.small_bundle import bundle, files, manifest

__all__ = ["bundle", "files", "manifest"]
