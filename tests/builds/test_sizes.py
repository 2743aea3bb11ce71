"""Optimization profiles: every size that was asked for lies in one, whatever its proportions."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shlex
from typing import Any

import numpy as np
import pytest

from fluxdeploy.build.sizes import SizeRange, any_size, overall, resolution_buckets
from fluxdeploy.bundle.manifest import Defaults, DimensionRange, LatentSpec
from fluxdeploy.errors import UsageError
from tests.docs.pages import PAGES

TRANSFORMER = {"B", "S", "L", "T"}
DEV = Defaults(
    height=1024,
    width=1024,
    num_inference_steps=28,
    guidance_scale=3.5,
    max_sequence_length=512,
    strength=0.6,
)
DEMO = dataclasses.replace(DEV, height=128, width=128)
OPTIONS = ("--bundle", "--width", "--height")
SMALL = dataclasses.replace(DEV, height=64, width=64, max_sequence_length=16)


def tokens(size: tuple[int, int]) -> int:
    return size[0] * size[1] // 256


def spans(latents: LatentSpec, sizes: SizeRange, defaults: Defaults = DEV) -> list[tuple[int, ...]]:
    """min, opt and max of the image tokens of each bucket."""
    profiles = resolution_buckets(TRANSFORMER, sizes, defaults, latents)
    return [dataclasses.astuple(profile["L"]) for profile in profiles]


def test_buckets_of_the_usual_sizes(latent_spec: LatentSpec) -> None:
    """256 to 2048 pixels around 1024, each bucket tuned for its largest picture."""
    assert spans(latent_spec, SizeRange()) == [
        (256, 1024, 1024),
        (1024, 4096, 4096),
        (4096, 16384, 16384),
    ]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # The size that is tuned for most is a border, or the best place inside a bucket.
        (((256, 256), (512, 256), (1024, 512)), [(256, 512, 2048)]),
        (((256, 256), (512, 512), (1024, 1024)), [(256, 1024, 1024), (1024, 4096, 4096)]),
        (((512, 512), (512, 512), (512, 512)), [(1024, 1024, 1024)]),
        (((512, 512), (512, 512), (512, 528)), [(1024, 1056, 1056)]),
        (((16, 16), (64, 64), (128, 128)), [(1, 16, 64)]),
        (((1024, 1024), (1024, 1024), (2048, 2048)), [(4096, 16384, 16384)]),
        (((1024, 1024), (2048, 2048), (2048, 2048)), [(4096, 16384, 16384)]),
    ],
)
def test_borders(
    latent_spec: LatentSpec, sizes: tuple[Any, Any, Any], expected: list[tuple[int, ...]]
) -> None:
    assert spans(latent_spec, SizeRange(*sizes)) == expected


def random_sizes(count: int) -> list[SizeRange]:
    random = np.random.RandomState(0)
    found: list[SizeRange] = []
    while len(found) < count:
        sides = 16 * random.randint(1, 200, (3, 2))
        least, opt, most = sorted(map(tuple, sides.tolist()), key=tokens)
        found.append(SizeRange(least, opt, most))
    return found


def test_buckets_have_no_gap_and_are_not_wide(latent_spec: LatentSpec) -> None:
    for sizes in random_sizes(200):
        assert sizes.min is not None
        assert sizes.opt is not None
        assert sizes.max is not None
        buckets = spans(latent_spec, sizes)
        assert buckets[0][0] == tokens(sizes.min)
        assert buckets[-1][2] == tokens(sizes.max)
        for before, after in itertools.pairwise(buckets):
            assert before[2] == after[0]
        for low, opt, high in buckets:
            assert low <= opt <= high
            # Whole tokens: a fourth of 4099 is 1024.
            assert high < 4 * low + 4 or low < 1024
            assert high < 4 * 1024 or low >= 1024 or len(buckets) == 1
        tuned = tokens(sizes.opt)
        if tuned >= 1024 and tuned > buckets[0][0]:
            assert any(opt == tuned for _, opt, _ in buckets)


def test_joint_tokens_are_text_and_image_tokens(latent_spec: LatentSpec) -> None:
    for defaults in (DEV, SMALL, dataclasses.replace(DEV, max_sequence_length=700)):
        for profile in resolution_buckets(TRANSFORMER, SizeRange(), defaults, latent_spec):
            for part in ("min", "opt", "max"):
                text, image, joint = (getattr(profile[symbol], part) for symbol in "SLT")
                assert joint == text + image
            usual = defaults.max_sequence_length
            assert profile["S"] == DimensionRange(min(usual, 64), usual, max(usual, 512))


def test_any_proportions_fit(latent_spec: LatentSpec) -> None:
    """A picture as wide as the largest and as low as the smallest has its rows and columns too."""
    sizes = SizeRange((256, 512), (1024, 768), (2048, 1536))
    symbols = {"B", "h", "w", "H", "W"}
    (profile,) = resolution_buckets(symbols, sizes, DEV, latent_spec)
    assert profile["H"] == DimensionRange(256, 1024, 2048)
    assert profile["W"] == DimensionRange(256, 768, 2048)
    assert profile["h"] == DimensionRange(32, 128, 256)
    assert profile["w"] == DimensionRange(32, 96, 256)


def test_components_without_image_tokens_have_one_profile(latent_spec: LatentSpec) -> None:
    (profile,) = resolution_buckets({"S", "N", "B"}, SizeRange(batch=3), DEV, latent_spec)
    assert list(profile) == ["B", "N", "S"]
    assert profile["B"] == DimensionRange(1, 1, 3)
    assert profile["N"] == DimensionRange(1, 28, 1000)


@pytest.mark.parametrize(
    ("size", "least", "most"),
    [
        ((1024, 1024), (256, 256), (2048, 2048)),
        ((768, 1360), (192, 336), (1536, 2720)),
        ((64, 64), (64, 64), (128, 128)),
        ((32, 48), (32, 48), (64, 96)),
        ((128, 512), (64, 128), (256, 1024)),
    ],
)
def test_sizes_follow_the_checkpoint(
    latent_spec: LatentSpec,
    size: tuple[int, int],
    least: tuple[int, int],
    most: tuple[int, int],
) -> None:
    """A quarter of each side, but no less than 64 pixels, to twice."""
    defaults = dataclasses.replace(DEV, height=size[0], width=size[1])
    found = spans(latent_spec, SizeRange(), defaults)
    assert (found[0][0], found[-1][2]) == (tokens(least), tokens(most))
    assert spans(latent_spec, SizeRange(opt=size)) == found


@pytest.mark.parametrize(("bundle", "own"), [("flux-dev", DEV), ("bundle", DEMO)])
def test_engines_of_the_default_sizes_draw_what_the_pages_show(
    latent_spec: LatentSpec, bundle: str, own: Defaults
) -> None:
    asked = {(own.height, own.width)}
    for page in PAGES:
        for line in re.findall(r"^fluxdeploy generate .*", page.read_text(), re.MULTILINE):
            words = shlex.split(line)
            given = {name: words[words.index(name) + 1] for name in OPTIONS if name in words}
            if given.get("--bundle", "bundle") == bundle:
                height, width = given.get("--height", own.height), given.get("--width", own.width)
                asked.add((int(height), int(width)))
    profiles = resolution_buckets({*TRANSFORMER, "H", "W"}, SizeRange(), own, latent_spec)
    for height, width in asked:
        wanted = {"L": tokens((height, width)), "H": height, "W": width}
        assert any(
            all(
                profile[symbol].min <= size <= profile[symbol].max
                for symbol, size in wanted.items()
            )
            for profile in profiles
        ), (height, width)
    assert len(asked) > 1 or bundle == "bundle"


def test_overall_is_what_some_profile_takes(latent_spec: LatentSpec) -> None:
    profiles = resolution_buckets(TRANSFORMER, SizeRange(batch=2), DEV, latent_spec)
    assert overall(profiles) == {
        "B": DimensionRange(1, 1, 2),
        "L": DimensionRange(256, 16384, 16384),
        "S": DimensionRange(64, 512, 512),
        "T": DimensionRange(320, 16896, 16896),
    }
    assert overall(profiles[:1]) == profiles[0]


def test_runtimes_without_profiles_take_any_size(latent_spec: LatentSpec) -> None:
    ranges = any_size({"B", "L", "T", "S", "h", "H", "W"}, DEV, latent_spec)
    assert list(ranges) == sorted(ranges)
    assert ranges["L"] == DimensionRange(1, 4096, 65536)
    assert ranges["H"] == ranges["W"] == DimensionRange(16, 1024, 4096)
    assert ranges["h"] == DimensionRange(2, 128, 512)
    assert ranges["S"].min == 1
    assert ranges["T"] == DimensionRange(2, 4608, 66048)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"min": (100, 64)}, "--min-size is 64x100; width and height must be multiples of 16"),
        ({"opt": (64, 1000)}, "--opt-size is 1000x64;"),
        ({"max": (-16, 4096)}, "--max-size is 4096x-16;"),
        ({"min": (1024, 1040)}, "--min-size 1040x1024, --opt-size 1024x1024 and --max-size"),
        ({"max": (512, 1024)}, "--max-size 1024x512 must not get smaller"),
        ({"batch": 0}, "--max-batch is 0; it must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(
    latent_spec: LatentSpec, sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        resolution_buckets(TRANSFORMER, SizeRange(**sizes), DEV, latent_spec)
