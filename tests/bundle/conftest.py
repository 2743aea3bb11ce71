"""A small bundle, whole and valid, for tests that break it."""

from tests.support.small_bundle import add_large_file, bundle, files, manifest

__all__ = ["add_large_file", "bundle", "files", "manifest"]
