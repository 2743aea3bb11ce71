"""Formulas in NumPy: noise, latents, schedule, positions, samplers. See docs/bundle.md."""
