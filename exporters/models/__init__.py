"""The networks of FLUX.1 as plain modules: MM-DiT and VAE of our own, text encoders transformers'.

Parameter names are those of the diffusers layout, so that a checkpoint's tensors need no renaming.
"""
