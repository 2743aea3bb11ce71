"""What is told of a build's quality: recipes in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fluxdeploy.bundle.recipe import NOTHING, Promise, Quality, RecipeRecord
from fluxdeploy.errors import NumericError

__all__ = ["describe_quality", "require_nothing_spared", "tell_recipe"]

_NAMED = 3


def tell_recipe(component: str, record: RecipeRecord, compute: str) -> Iterator[str]:
    """What a component's recipe is and does, a sentence each."""
    recipe, before, after = record.recipe, record.before, record.after
    if recipe.spared or recipe.smoothed:
        yield f"{component} in {record.precision}: {_changes(record, compute)}"
        if before is not None and after is not None:
            yield (
                f"  that makes {describe_quality(after)} of {describe_quality(before)}; "
                f"{_promised(record.promise)} was promised"
            )
    elif after is not None:
        yield f"{component} in {record.precision}: {describe_quality(after)}"
    if after is not None and record.promise.missing(after) > 0:
        yield (
            f"{component} does not keep {_promised(record.promise)}, with all of it in {compute} "
            "too: what comes before it costs more; use a wider --component-precision for t5 and "
            "conditioner"
        )


def _changes(record: RecipeRecord, compute: str) -> str:
    recipe = record.recipe
    wide = [name for name, left in recipe.spared.items() if left == NOTHING]
    inputs = [name for name, left in recipe.spared.items() if left != NOTHING]
    words = []
    more = f", {record.extra_bytes / 2**20:.1f} MiB more" if record.extra_bytes else ""
    if wide:
        words.append(f"left in {compute}: {_named(wide)} ({record.share:.0%} of the weights{more})")
    if inputs:
        words.append(f"with narrow weights alone: {_named(inputs)}")
    if recipe.smoothed:
        words.append(f"outliers moved into weights: {_named(list(recipe.smoothed))}")
    return "; ".join(words)


def describe_quality(quality: Quality) -> str:
    """A quality in words."""
    words = [f"cosine {quality.cosine:.5f}"]
    if quality.psnr is not None and quality.ssim is not None:
        words = [f"pictures of {quality.psnr:.1f} dB (SSIM {quality.ssim:.3f})"]
    return ", ".join(words)


def _promised(promise: Promise) -> str:
    words = []
    if promise.psnr is not None:
        words.append(f"{promise.psnr:g} dB")
    if promise.ssim is not None:
        words.append(f"SSIM {promise.ssim:g}")
    if promise.cosine is not None:
        words.append(f"a cosine of {promise.cosine:g}")
    return " with ".join(words)


def require_nothing_spared(recipes: Mapping[str, RecipeRecord]) -> None:
    """Raise `NumericError` where a component keeps its promise only with a recipe."""
    for component, record in recipes.items():
        if not record.recipe.spared and not record.recipe.smoothed:
            continue
        reached = "" if record.before is None else f" gives {describe_quality(record.before)} and"
        asked = "" if record.before is None else f" {_promised(record.promise)}"
        raise NumericError(
            f"{component} in {record.precision}{reached} does not keep what was promised,{asked}: "
            f"{_changes(record, 'a wider type')}. Build without --strict, lower --quality, or use "
            "a wider precision."
        )


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
