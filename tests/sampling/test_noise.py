from __future__ import annotations

import numpy as np
import pytest

from fluxdeploy.errors import UsageError
from fluxdeploy.sampling.noise import TorchGenerator, standard_normal

WITHIN = 4e-6
"""How far PyTorch itself is from its own formula, by the instructions that it finds.

Without AVX2 it rounds the angle, up to 2π, otherwise than with it: up to 4e-7, times a radius of up
to 6, and the last bit of a value of 4 is another 5e-7.
"""


def torch_normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    torch = pytest.importorskip("torch")
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).numpy()


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("shape", [(16,), (1, 16, 64, 64), (3, 5, 7), (2, 3)])
def test_equals_torch_for_every_kind_of_seed_and_size(seed: int, shape: tuple[int, ...]) -> None:
    noise = standard_normal(shape, seed)
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise, torch_normal(shape, seed), rtol=0, atol=WITHIN)


@pytest.mark.parametrize("size", [*range(35), 47, 48, 1000])
def test_equals_torch_at_sizes_around_its_blocks_of_16(size: int) -> None:
    np.testing.assert_allclose(
        standard_normal((size,), 7), torch_normal((size,), 7), rtol=0, atol=WITHIN
    )


def test_stays_as_near_to_torch_over_a_million_values() -> None:
    shape = (1, 16, 256, 256)
    np.testing.assert_allclose(
        standard_normal(shape, 2024), torch_normal(shape, 2024), rtol=0, atol=WITHIN
    )


def test_draws_follow_one_another_as_from_one_torch_generator() -> None:
    torch = pytest.importorskip("torch")
    reference = torch.Generator("cpu").manual_seed(11)
    generator = TorchGenerator(11)
    # Odd counts below 16 leave a value for the next small draw, over the large ones between.
    for shape in [(3,), (2, 16), (20,), (1,), (5,), (33,), (2,), (15,), (4, 4)]:
        np.testing.assert_allclose(
            generator.normal(shape),
            torch.randn(shape, generator=reference).numpy(),
            rtol=0,
            atol=WITHIN,
        )


def test_known_values_hold_without_torch() -> None:
    np.testing.assert_allclose(
        standard_normal((20,), 0)[:2], [-1.1258398, -1.1523602], rtol=0, atol=1e-6
    )
    np.testing.assert_allclose(
        standard_normal((3,), 0), [1.5409961, -0.2934289, -2.1787894], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "7"])
def test_other_seeds_are_refused_with_the_range(seed: object) -> None:
    with pytest.raises(UsageError, match=r"0 to 2\^64 - 1"):
        TorchGenerator(seed)  # type: ignore[arg-type]
