"""The transformer on kernels of our own, for Hopper GPUs."""
