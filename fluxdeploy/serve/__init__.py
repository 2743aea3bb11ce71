"""Servers over the host: Triton's model repository, and the images API."""
