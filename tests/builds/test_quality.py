"""Recipes in words: what was spared, what it cost, and what a strict build does not take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluxdeploy.build.quality import require_nothing_spared, tell_recipe
from fluxdeploy.bundle.recipe import (
    NOTHING,
    WEIGHTS,
    Promise,
    Quality,
    Recipe,
    RecipeRecord,
    check_recipe,
)
from fluxdeploy.bundle.typed_json import FieldError
from fluxdeploy.errors import NumericError

PLAIN = RecipeRecord(
    "fp8", Promise(psnr=22.0, ssim=0.82), Recipe(), Quality(0.97, 23.4, 0.9), None, 0.0, 0
)
PLAIN = replace(PLAIN, after=PLAIN.before)
SPARED = replace(
    PLAIN,
    recipe=Recipe(
        {"a": NOTHING, "b": NOTHING, "c": WEIGHTS, "d": NOTHING, "e": NOTHING}, {"a": 0.5}
    ),
    before=Quality(0.9, 18.0, 0.7),
    share=0.123,
    extra_bytes=3 << 20,
)


def test_a_precision_that_keeps_its_promise_has_one_line() -> None:
    (line,) = tell_recipe("transformer", PLAIN, "bf16")
    assert line == "transformer in fp8: pictures of 23.4 dB (SSIM 0.900)"


def test_a_recipe_tells_layers_and_cost() -> None:
    first, second = tell_recipe("transformer", SPARED, "bf16")
    assert first == (
        "transformer in fp8: left in bf16: a, b, d and 1 more (12% of the weights, 3.0 MiB more); "
        "with narrow weights alone: c; outliers moved into weights: a"
    )
    assert "23.4 dB (SSIM 0.900) of pictures of 18.0 dB" in second
    assert "22 dB with SSIM 0.82 was promised" in second


def test_a_promise_that_is_not_kept_is_told() -> None:
    lines = list(tell_recipe("transformer", replace(SPARED, after=SPARED.before), "bf16"))
    assert "does not keep 22 dB with SSIM 0.82" in lines[-1]


def test_strict_takes_no_recipe() -> None:
    require_nothing_spared({"transformer": PLAIN, "t5": PLAIN})
    for recipe in (Recipe({"a": NOTHING}, {}), Recipe({}, {"a": 0.5})):
        with pytest.raises(NumericError, match=r"18\.0 dB.*22 dB.*without --strict"):
            require_nothing_spared({"t5": PLAIN, "transformer": replace(SPARED, recipe=recipe)})


@pytest.mark.parametrize(
    ("promise", "quality", "missing"),
    [
        (Promise(), Quality(0.1, 1.0, 0.1), float("-inf")),
        (Promise(psnr=22), Quality(0.9, 20.0, 0.5), 2.0),
        (Promise(psnr=22), Quality(0.9, 30.0, 0.5), -8.0),
        (Promise(cosine=0.99), Quality(0.9), 10.0),
        (Promise(ssim=0.9), Quality(0.9, 9.0, 0.0), 10.0),
        (Promise(psnr=22, ssim=0.9), Quality(0.9, 23.0, 0.8), 3.0103),
    ],
)
def test_what_is_missing_is_in_decibels(promise: Promise, quality: Quality, missing: float) -> None:
    assert promise.missing(quality) == pytest.approx(missing, abs=1e-3)


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        (Recipe({"a": "all"}, {}), r"x\.recipe\.spared\.a"),
        (Recipe({}, {"a": 0.0}), r"x\.recipe\.smoothed\.a"),
        (Recipe({}, {"a": 1.5}), r"x\.recipe\.smoothed\.a"),
        (Recipe({str(i): NOTHING for i in range(20_000)}, {}), "16384 are the most"),
    ],
)
def test_recipes_that_nothing_can_be_made_of_are_refused(recipe: Recipe, where: str) -> None:
    with pytest.raises(FieldError, match=where):
        check_recipe(replace(PLAIN, recipe=recipe), "x")
