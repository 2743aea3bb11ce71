"""The rows of the precisions."""

from __future__ import annotations

from fluxdeploy.precision import PRECISIONS


def test_layers_have_a_gate_where_they_are_quantized() -> None:
    for name, row in PRECISIONS.items():
        assert (row.min_sqnr is None) == (row.quantization is None), name


def test_a_narrower_precision_has_no_stricter_gate() -> None:
    for wide, narrow in (
        ("fp32", "fp16"),
        ("fp16", "bf16"),
        ("bf16", "fp8-weights"),
        ("fp8-weights", "fp8-linears"),
        ("fp8-linears", "fp8"),
        ("bf16", "int8-weights"),
        ("int8-weights", "int8-dynamic"),
        ("int8-weights", "int8"),
    ):
        before, after = PRECISIONS[wide], PRECISIONS[narrow]
        assert after.min_psnr <= before.min_psnr, narrow
        assert after.min_ssim <= before.min_ssim, narrow
        assert after.max_error >= before.max_error, narrow
        assert after.min_cosine <= before.min_cosine, narrow
