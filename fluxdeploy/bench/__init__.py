"""Benchmarks: bundles and other ways to run the same model, timed in turns."""
