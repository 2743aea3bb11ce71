"""A small bundle to replace."""

from tests.support.small_bundle import add_large_file, bundle, files, manifest

__all__ = ["add_large_file", "bundle", "files", "manifest"]
