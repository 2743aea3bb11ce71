from __future__ import annotations

import numpy as np
import pytest

from fluxdeploy.bundle.manifest import RopeSpec
from fluxdeploy.errors import BundleError
from fluxdeploy.sampling.rope import joint_ids, rope_tables


@pytest.mark.parametrize(
    ("axes_dims", "theta"), [((16, 56, 56), 10000.0), ((2, 4, 2), 100.0), ((8, 20, 36), 10000.0)]
)
@pytest.mark.parametrize(("text", "rows", "columns"), [(5, 3, 7), (512, 64, 2), (1, 1, 1)])
def test_ids_and_tables_equal_diffusers(
    axes_dims: tuple[int, ...], theta: float, text: int, rows: int, columns: int
) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    image_ids = diffusers.FluxPipeline._prepare_latent_image_ids(
        1, rows, columns, "cpu", torch.float32
    )
    reference_ids = torch.cat([torch.zeros(text, 3), image_ids])
    ids = joint_ids(text, rows, columns, 3)
    np.testing.assert_array_equal(ids, reference_ids.numpy())

    reference = FluxPosEmbed(theta=theta, axes_dim=list(axes_dims))(reference_ids)
    tables = rope_tables(ids, RopeSpec(axes_dims, theta))
    for table, expected in zip(tables, reference, strict=True):
        assert table.dtype == np.float32
        assert table.shape == (text + rows * columns, sum(axes_dims))
        np.testing.assert_allclose(table, expected.numpy(), rtol=0, atol=6e-8)


def test_text_is_not_turned_and_pairs_share_an_angle(rope_spec: RopeSpec) -> None:
    cos, sin = rope_tables(joint_ids(4, 3, 5, 3), rope_spec)
    np.testing.assert_array_equal(cos[:4], 1)
    np.testing.assert_array_equal(sin[:4], 0)
    np.testing.assert_array_equal(cos[:, 0::2], cos[:, 1::2])
    np.testing.assert_array_equal(sin[:, 0::2], sin[:, 1::2])
    # Token (row 2, column 1): the first channels of the second axis turn by 2, of the third by 1.
    token = 4 + 2 * 5 + 1
    np.testing.assert_allclose(sin[token, [0, 16, 72]], np.sin([0, 2, 1]), rtol=1e-6)


def test_another_number_of_axes_is_refused() -> None:
    with pytest.raises(BundleError, match="There must be 3"):
        rope_tables(joint_ids(1, 1, 1, 3), RopeSpec((16, 16), 10000.0))


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_rows_and_columns_are_the_last_two_axes(axes: int) -> None:
    ids = joint_ids(2, 3, 4, axes)
    assert ids.shape == (2 + 12, axes)
    np.testing.assert_array_equal(ids[:2], 0)
    np.testing.assert_array_equal(ids[:, :-2], 0)
    np.testing.assert_array_equal(ids[2 + 2 * 4 + 1, -2:], [2, 1])


def test_a_picture_needs_two_axes() -> None:
    with pytest.raises(BundleError, match="Rows and columns take two"):
        joint_ids(2, 3, 4, 1)
