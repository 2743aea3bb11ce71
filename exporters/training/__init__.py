"""Training of the demo checkpoints: `python -m exporters.training FOLDER`.

`loop` is the loop of every stage; `vae`, `decoder`, `text`, `flow`, `guidance`, `path` and
`few_steps` are the stages, in that order; `data` draws what they learn from, `networks` and
`checkpoint` make and write the models. What ships with the package, in fluxdeploy/demo/checkpoints,
is `dev`, `schnell` and `training.json` of a run's folder. Needs the packages of `fluxdeploy[dev]`.
"""
