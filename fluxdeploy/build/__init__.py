"""From a checkpoint to a bundle: `resolve` settles it once, `plan` tells what it takes, `build`
makes it."""
