"""What programs for diffusers do is done here too, or refused with a sentence."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from fluxdeploy.errors import UnusedArgumentWarning, UsageError
from fluxdeploy.host.diffusers_names import ARGUMENTS, ATTRIBUTES
from fluxdeploy.host.pipeline import FluxPipeline
from tests.host.conftest import POOLED, TEXT, MemoryEngine


@pytest.mark.parametrize("name", [*ARGUMENTS, "sed", "Prompt"])
def test_an_argument_that_is_not_here_is_refused_in_words(pipe: FluxPipeline, name: str) -> None:
    with pytest.raises(UsageError, match=f"There is no .*{name}"):
        pipe("a fox", **{name: None})


def test_the_sixth_argument_needs_its_name(pipe: FluxPipeline) -> None:
    with pytest.raises(UsageError, match="give it by its name"):
        pipe("a fox", None, None, None, 1.0, 64)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_what_a_pipeline_has_not_is_said(pipe: FluxPipeline, name: str) -> None:
    assert not hasattr(pipe, name)
    with pytest.raises(AttributeError, match=f"has no `{name}`: "):
        getattr(pipe, name)
    with pytest.raises(UsageError, match=f"has no `{name}`: "):
        setattr(pipe, name, None)


def test_other_attributes_are_as_ever(pipe: FluxPipeline) -> None:
    assert copy.copy(pipe).bundle is pipe.bundle
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        pipe.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(UsageError, match="fluxdeploy build"):
        FluxPipeline.from_pretrained("x")


def embeddings(**other: Any) -> dict[str, Any]:
    text, pooled = np.ones((1, 9, TEXT)), np.ones((1, POOLED))
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled, **other}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Give a `prompt`, or"),
        ({"prompt_2": "a"}, "Give a `prompt`, or"),
        (embeddings(prompt="a"), "`prompt` and embeddings are both given"),
        (embeddings(prompt_2="a"), "`prompt_2` and embeddings are both given"),
        (embeddings(pooled_prompt_embeds=None), "needs `pooled_prompt_embeds` too"),
        (embeddings(prompt_embeds=None), "needs `prompt_embeds` too"),
        (embeddings(prompt_embeds=np.ones((9, TEXT))), r"`prompt_embeds` has shape \[9, 10\]"),
        (embeddings(pooled_prompt_embeds=np.ones((2, POOLED))), r"has shape \[2, 6\]"),
        (embeddings(prompt_embeds=np.full((1, 9, TEXT), np.nan)), "NaN or infinity"),
        (embeddings(prompt_embeds="a"), "must be an array of numbers"),
        (embeddings(negative_prompt="a", true_cfg_scale=2.0), "The text has 9 tokens, and"),
        ({"prompt": ["a", "b"], "prompt_2": ["a", "b", "c"]}, "There are 3 `prompt_2` for 2"),
        ({"prompt": "a", "seed": [1, 2]}, "There are 2 seeds for 1 pictures"),
        ({"prompt": ["a", "b"], "seed": [1, -2]}, "out of range"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "alone. The"),
        ({"prompt": "a", "output_type": "pt"}, "'latent'"),
        ({"prompt": "a", "return_dict": 1}, "`return_dict` must be True or False"),
        ({"prompt": "a", "output_type": "latent", "padding_mask_crop": 8}, "`padding_mask_crop`"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        pipe(**options)
    assert not any(engine.runs for engine in engines.values())


def test_embeddings_run_no_encoder(pipe: FluxPipeline, engines: dict[str, MemoryEngine]) -> None:
    assert len(pipe(**embeddings(), num_images_per_prompt=2).images) == 2
    assert not engines["clip"].runs
    assert not engines["t5"].runs


def test_latents_run_no_decoder(pipe: FluxPipeline, engines: dict[str, MemoryEngine]) -> None:
    output = pipe("a fox", output_type="latent")
    assert np.shape(output[0]) == (1, 6, 64)
    assert not engines["vae_decoder"].runs


def test_prompts_are_kept_by_what_each_encoder_reads(
    pipe: FluxPipeline, engines: dict[str, MemoryEngine]
) -> None:
    first = pipe("a fox", "an owl", seed=1, output_type="np").images
    second = pipe("a fox", "a hen", seed=1, output_type="np").images
    assert np.abs(np.subtract(first, second)).max() > 0
    assert (len(engines["clip"].runs), len(engines["t5"].runs)) == (1, 2)


def test_the_progress_bar_is_shown_where_it_is_asked_for(
    pipe: FluxPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("a fox")
    pipe.set_progress_bar_config(disable=True)
    pipe("a fox")
    assert capsys.readouterr().err == ""
    with pytest.warns(UnusedArgumentWarning, match="`leave` does nothing"):
        pipe.set_progress_bar_config(desc="Foxes", leave=False)
    pipe("a fox")
    assert "Foxes" in capsys.readouterr().err
