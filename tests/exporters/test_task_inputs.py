"""What is measured and judged over has around the latents what the host puts there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from exporters.calibrate.trajectory import Calibration, start_samples, take_step
from exporters.checkpoint import open_checkpoint
from exporters.components.registry import COMPONENTS
from fluxdeploy.progress import Progress

SIZE = (32, 48)
TOKENS = 6


@pytest.mark.parametrize(("name", "tokens"), [("fill", 6), ("control", 6), ("kontext", 12)])
def test_a_step_is_taken_with_what_a_task_adds(
    name: str, tokens: int, checkpoint: Callable[[str], Path]
) -> None:
    opened = open_checkpoint(str(checkpoint(name)))
    calibration = Calibration(("a fox",), 0, (SIZE,), 2, 3.5)
    (sample,) = start_samples(opened, calibration, Progress(quiet=True))
    inputs = sample.inputs(0)
    hidden, text = inputs["hidden_states"], inputs["context"].shape[1]
    assert hidden.shape == (1, tokens, opened.transformer.in_channels)
    assert inputs["rope_cos"].shape[0] == text + tokens
    beside = hidden[:, :TOKENS, 64:] if tokens == TOKENS else hidden[:, TOKENS:]
    assert np.abs(beside).max() > 0.1, "nothing stands around the latents"
    before = sample.latents
    take_step(*COMPONENTS["transformer"].source(opened, "fp32"), [sample], 0)
    assert sample.latents.shape == before.shape
    assert not np.array_equal(sample.latents, before)
