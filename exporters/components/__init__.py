"""The networks of a bundle, each declared once as a `Component`: see `registry`.

A component is a `Chain` of stages; a stage uses a piece, a module that is traced once. `mmdit`,
`text_encoders` and `vae` have the declarations, `run` runs a chain in PyTorch.
"""
