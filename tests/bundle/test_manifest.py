"""The manifest's JSON: a strict round trip, and a refusal that names the place for all else."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from fluxdeploy.bundle.manifest import (
    SCHEMA_VERSION,
    DimensionRange,
    Manifest,
    PreviewSpec,
    SkipRecord,
    TensorSpec,
    missing_component,
)
from fluxdeploy.bundle.manifest_json import from_json, to_json
from fluxdeploy.bundle.paths import path_problem
from fluxdeploy.errors import BundleError

ABSENT = object()
PREVIEW = PreviewSpec(((0.25, 0.0, -0.5),) * 16, (0.5, 0.5, 0.5))


def test_round_trip_gives_an_equal_manifest(manifest: Manifest) -> None:
    text = to_json(manifest)
    assert from_json(text, "here") == manifest
    assert to_json(from_json(text, "here")) == text
    assert text.endswith("}\n")
    assert f'  "schema_version": {SCHEMA_VERSION},\n  "family": "flux",' in text
    assert '"é"' in text


def test_floats_round_trip_exactly(manifest: Manifest) -> None:
    odd = replace(manifest.latents, scaling_factor=math.pi / 7, shift_factor=-1e-17)
    assert from_json(to_json(replace(manifest, latents=odd)), "here").latents == odd


def test_equal_manifests_give_equal_text(manifest: Manifest) -> None:
    t5 = manifest.components["t5"]
    one = replace(manifest, components={"a": t5, "t5": t5}, provenance={"x": {"b": 1, "a": 2}})
    two = replace(manifest, components={"t5": t5, "a": t5}, provenance={"x": {"a": 2, "b": 1}})
    assert to_json(one) == to_json(two)


@pytest.mark.parametrize("value", [math.nan, math.inf, "\ud800"])
def test_what_json_cannot_hold_is_not_written(manifest: Manifest, value: object) -> None:
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        to_json(replace(manifest, provenance={"x": value}))


def _place(plain: Any, where: str) -> tuple[Any, Any]:
    *steps, last = where.replace("[", ".[").split(".")
    for step in steps:
        plain = plain[int(step[1:-1])] if step.startswith("[") else plain[step]
    return plain, int(last[1:-1]) if last.startswith("[") else last


def _refusal(manifest: Manifest, where: str, value: object) -> str:
    plain = json.loads(to_json(manifest))
    holder, key = _place(plain, where)
    if value is ABSENT:
        del holder[key]
    else:
        holder[key] = value
    with pytest.raises(BundleError) as caught:
        from_json(json.dumps(plain), "bundle/fluxdeploy.json")
    return str(caught.value)


FILE = "components.t5.files[0]"
ENGINE = "components.t5.engines[0]"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("family", ABSENT, "is missing"),
        ("surprise", 1, "is not a known field"),
        (f"{FILE}.mode", 0o777, "is not a known field"),
        ("schema_version", True, "must be an integer, not true"),
        ("family", 1, "must be a string, not 1"),
        ("guidance_embedding", 1, "must be true or false, not 1"),
        ("components", [], "must be an object, not []"),
        ("components.t5.files", {}, "must be a list, not {}"),
        ("components.t5.golden", 0, "must be an object or null, not 0"),
        ("components.t5.key", None, "must be a string, not null"),
        (f"{FILE}.size", True, "must be an integer, not true"),
        (f"{FILE}.size", 7.0, "must be an integer, not 7.0"),
        (f"{FILE}.size", -1, "sizes are not negative"),
        (f"{FILE}.sha256", "ab", "64 lower-case hexadecimal digits"),
        (f"{FILE}.sha256", "A" * 64, "64 lower-case hexadecimal digits"),
        (f"{FILE}.path", "../../etc/passwd", "leaves the bundle"),
        (f"{FILE}.path", "onnx/../../x", "leaves the bundle"),
        (f"{FILE}.path", "/etc/passwd", "is absolute"),
        (f"{FILE}.path", "C:/windows", "is absolute"),
        (f"{FILE}.path", "onnx\\t5.onnx", "holds a backslash"),
        (f"{FILE}.path", "onnx//t5.onnx", "has an empty part"),
        (f"{FILE}.path", "./t5.onnx", "has an empty part"),
        (f"{FILE}.path", "onnx/", "has an empty part"),
        (f"{FILE}.path", "onnx/" + "x" * 256, "longer than file systems allow"),
        (f"{FILE}.path", "é" * 128, "longer than file systems allow"),
        (f"{FILE}.path", "abc/" * 300 + "x", "longer than file systems allow"),
        (f"{FILE}.path", "", "is empty"),
        (f"{FILE}.path", "t5\0.onnx", "holds a control character"),
        (f"{FILE}.path", "fluxdeploy.json", "is the manifest itself"),
        ("tokenizers.clip.path", "tokenizers/t5.json", "not among the tokenizer's files"),
        ("tokenizers.clip.max_length", 1, "with the prefix and the suffix it is at least 2"),
        ("tokenizers.clip.pad_id", -1, "ids are from 0 to 2147483647"),
        ("tokenizers.clip.pad_id", 2**31, "ids are from 0 to 2147483647"),
        ("tokenizers.clip.prefix[0]", -1, "ids are from 0 to 2147483647"),
        ("tokenizers.clip.suffix[0]", 2**31, "ids are from 0 to 2147483647"),
        ("tokenizers.clip.suffix[0]", 1.0, "must be an integer, not 1.0"),
        ("tokenizers.clip.padding_side", "Left", "'left' or 'right'"),
        ("tokenizers.clip.truncation_side", "middle", "'left' or 'right'"),
        (f"{ENGINE}.path", "onnx/other.onnx", "not among the component's files"),
        ("components.t5.golden.path", "golden/no", "not among the component's files"),
        ("components.t5.golden.max_error", -1, "is negative"),
        ("components.t5.golden.min_cosine", 2, "is not between -1 and 1"),
        ("components.t5.inputs[0].dtype", "bfloat16", "tensors are float32 or int32"),
        ("components.t5.inputs[0].shape[0]", 0, "a size from 1 to 2147483647"),
        ("components.t5.inputs[0].shape[0]", "Q", "a size from 1 to 2147483647 or one of B,"),
        ("components.t5.inputs[0].shape[0]", 1.5, "must be an integer or a string, not 1.5"),
        (
            f"{ENGINE}.dimensions.S.min",
            513,
            "1 <= min <= opt <= max <= 2147483647, not 513, 512, 512",
        ),
        (f"{ENGINE}.dimensions.S.opt", 513, "not 1, 513, 512"),
        (f"{ENGINE}.dimensions.B.min", 0, "1 <= min <= opt <= max"),
        (f"{ENGINE}.dimensions.B", ABSENT, "exactly the symbols"),
        (f"{ENGINE}.dimensions.L", {"min": 1, "opt": 1, "max": 1}, "exactly the symbols"),
        ("rope.axes_dims", [16, 56, 57], "even, positive"),
        ("rope.axes_dims", [15, 57, 56], "even, positive"),
        ("rope.axes_dims", [], "even, positive"),
        ("rope.theta", 0, "from 1 to 1e+12"),
        ("latents.patch_size", 0, "must be positive"),
        ("latents.scaling_factor", 0, "from 1e-06 to 1e+06"),
        ("schedule.shift", -3, "from 1e-06 to 1e+06"),
        ("schedule.time_shift_type", "cubic", "'exponential' or 'linear'"),
        ("schedule.base_image_seq_len", 4096, "less than max_image_seq_len"),
        ("defaults.height", 1000, "a multiple of 16"),
        ("defaults.num_inference_steps", 0, "must be positive"),
        ("defaults.guidance_scale", -1, "from 0 to 1e+06"),
        ("defaults.strength", 0, "above 0 and at most 1"),
        ("defaults.strength", 1.5, "above 0 and at most 1"),
        ("quality.min_psnr", -1, "between 0 and 150 dB"),
        ("quality.min_psnr", 1e300, "between 0 and 150 dB"),
        ("quality.min_psnr", None, "must be a number, not null"),
        ("quality.min_ssim", 1.5, "between 0 and 1"),
        ("quality.min_ssim", -0.5, "between 0 and 1"),
        ("quality.min_sqnr", -1, "between 0 and 150 dB"),
        ("quality.min_sqnr", "15", "must be a number or null"),
    ],
)
def test_refusal_names_the_place_and_what_to_do(
    manifest: Manifest, where: str, value: object, message: str
) -> None:
    refusal = _refusal(manifest, where, value)
    assert message in refusal
    assert refusal.startswith("bundle/fluxdeploy.json: ")
    assert "`fluxdeploy build`" in refusal
    parent = where.rsplit(".", 1)[0] if "symbols" in message else where
    assert parent.removesuffix(".B").removesuffix(".min").removesuffix(".opt") in refusal


def test_what_may_be_absent_is_written_only_where_it_says_something(manifest: Manifest) -> None:
    plain = json.loads(to_json(manifest))
    assert "skips" not in plain
    assert "preview" not in plain
    assert "spacing" not in plain["schedule"]
    record = SkipRecord("euler", 4, (1, 3), 1, 32, 48, 34.0, 35.5, 8)
    schedule = replace(manifest.schedule, spacing="beta")
    said = replace(manifest, schedule=schedule, skips=(record,), preview=PREVIEW)
    assert from_json(to_json(said), "here") == said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": (0,)}, "must rise, from 1 to at most 3"),
        ({"steps": (3, 1)}, "must rise"),
        ({"steps": (4,)}, "must rise"),
        ({"order": 3}, "from 0 to 2"),
        ({"psnr": 33.0}, "psnr is 33; it must be from 34"),
        ({"pictures": 0}, "1 is the least"),
        ({"height": 0}, "height is 0"),
        ({"num_inference_steps": 10**6}, "from 1 to 10000"),
    ],
)
def test_skips_that_cannot_be_are_refused(
    manifest: Manifest, changes: dict[str, Any], words: str
) -> None:
    record = SkipRecord("euler", 4, (1, 3), 1, 32, 48, 34.0, 35.5, 8)
    text = to_json(replace(manifest, skips=(replace(record, **changes),)))
    with pytest.raises(BundleError, match=words):
        from_json(text, "here")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"matrix": PREVIEW.matrix[1:]}, "preview.matrix has 15 rows; latents.channels is 16"),
        ({"matrix": ((0.5,) * 4, *PREVIEW.matrix[1:])}, r"matrix\[0\] has 4 numbers; there are 3"),
        ({"matrix": ((0.5, 0.5, -2e6), *PREVIEW.matrix[1:])}, r"\[0\]\[2\] is -2e\+06; it must be"),
        ({"bias": (0.5, 0.5)}, "preview.bias has 2 numbers"),
        ({"bias": (0.5, 2e6, 0.5)}, r"preview.bias\[1\] is 2e\+06"),
    ],
)
def test_previews_that_cannot_be_are_refused(
    manifest: Manifest, changes: dict[str, Any], words: str
) -> None:
    text = to_json(replace(manifest, preview=replace(PREVIEW, **changes)))
    with pytest.raises(BundleError, match=words):
        from_json(text, "here")


def test_every_field_of_every_record_is_needed(manifest: Manifest) -> None:
    def places(value: object, where: str) -> list[str]:
        if is_dataclass(value):
            found = []
            for field in fields(value):
                if field.metadata.get("optional"):
                    continue
                at = f"{where}.{field.name}" if where else field.name
                found += [at, *places(getattr(value, field.name), at)]
            return found
        if isinstance(value, tuple):
            return [p for i, entry in enumerate(value) for p in places(entry, f"{where}[{i}]")]
        if isinstance(value, dict) and where != "provenance":
            return [p for key, entry in value.items() for p in places(entry, f"{where}.{key}")]
        return []

    found = places(manifest, "")
    assert len(found) > 60
    for where in found:
        assert f"{where} is missing" in _refusal(manifest, where, ABSENT)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (SCHEMA_VERSION + 1, "upgrade fluxdeploy"),
        *((version, "build the bundle again with `fluxdeploy build`") for version in (0, 1, 2)),
    ],
)
def test_unknown_schema_version_says_which_one_is_read(
    manifest: Manifest, version: int, advice: str
) -> None:
    refusal = _refusal(manifest, "schema_version", version)
    assert (
        f"has schema version {version}, and this program reads version {SCHEMA_VERSION}" in refusal
    )
    assert advice in refusal


def test_a_newer_manifest_is_refused_for_its_version_not_for_its_fields() -> None:
    with pytest.raises(BundleError, match="schema version 7"):
        from_json('{"schema_version": 7, "something": "new"}', "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "must be an object"),
        ("null", "must be an object"),
        ('{"schema_version": 1, "schema_version": 1}', "occurs twice"),
        ('{"schema_version": 1e999}', "too large"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "schema_version is missing"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        from_json(text, "here")


def test_a_shared_file_is_recorded_alike_everywhere(manifest: Manifest) -> None:
    t5 = manifest.components["t5"]
    first, *others = t5.files
    for other in (replace(first, size=first.size + 1), replace(first, sha256="0" * 64)):
        changed = replace(t5, files=(other, *others))
        with pytest.raises(BundleError, match=r"components\.u\.files\[0\] gives 'onnx/t5\.onnx'"):
            from_json(to_json(replace(manifest, components={"t5": t5, "u": changed})), "here")


def test_whole_numbers_may_stand_for_floats(manifest: Manifest) -> None:
    plain = json.loads(to_json(manifest))
    plain["rope"]["theta"] = 10000
    theta = from_json(json.dumps(plain), "here").rope.theta
    assert theta == 10000
    assert isinstance(theta, float)


def test_an_engine_of_fixed_sizes_has_no_dimensions(manifest: Manifest) -> None:
    t5 = manifest.components["t5"]
    fixed = replace(
        t5,
        inputs=(replace(t5.inputs[0], shape=(1, 77)),),
        outputs=(replace(t5.outputs[0], shape=(1, 77, 8)),),
        engines=(replace(t5.engines[0], dimensions={}),),
    )
    assert from_json(to_json(replace(manifest, components={"another": fixed})), "here")
    wrong = replace(
        fixed, engines=(replace(t5.engines[0], dimensions={"B": DimensionRange(1, 1, 1)}),)
    )
    with pytest.raises(BundleError, match="symbols of the component's tensors: none, not B"):
        from_json(to_json(replace(manifest, components={"another": wrong})), "here")


DOCUMENTED = {
    "clip": ({"input_ids": "B 77"}, {"pooled_embeddings": "B 768"}),
    "t5": ({"input_ids": "B S"}, {"text_embeddings": "B S 4096"}),
    "conditioner": (
        {
            "text_embeddings": "B S 4096",
            "pooled_embeddings": "B 768",
            "timestep": "N",
            "guidance": "B",
        },
        {"context": "B S 3072", "modulation": "N B 344 3072"},
    ),
    "transformer": (
        {
            "hidden_states": "B L 64",
            "context": "B S 3072",
            "modulation": "B 344 3072",
            "rope_cos": "T 128",
            "rope_sin": "T 128",
        },
        {"velocity": "B L 64"},
    ),
    "vae_decoder": ({"latents": "B 16 h w"}, {"images": "B 3 H W"}),
    "vae_encoder": ({"images": "B 3 H W"}, {"mean": "B 16 h w", "logvar": "B 16 h w"}),
}
"""The tensors of FLUX.1-dev, as docs/components.md has them."""

RANGES = {
    "B": DimensionRange(1, 1, 64),
    "S": DimensionRange(1, 512, 512),
    "L": DimensionRange(1, 4096, 65536),
    "T": DimensionRange(2, 4608, 66048),
    "N": DimensionRange(1, 28, 1000),
    **{side: DimensionRange(16, 1024, 4096) for side in "HW"},
    **{side: DimensionRange(2, 128, 512) for side in "hw"},
}


def _specs(tensors: dict[str, str]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name,
            "int32" if name == "input_ids" else "float32",
            tuple(int(size) if size.isdigit() else size for size in shape.split()),
        )
        for name, shape in tensors.items()
    )


@pytest.fixture
def whole(manifest: Manifest) -> Any:
    """The manifest of FLUX.1-dev as JSON: all components, and both tokenizers."""
    t5, clip = manifest.components["t5"], manifest.tokenizers["clip"]
    components = {}
    for name, sides in DOCUMENTED.items():
        inputs, outputs = map(_specs, sides)
        symbols = {size for spec in (*inputs, *outputs) for size in spec.shape}
        dimensions = {symbol: RANGES[symbol] for symbol in symbols if isinstance(symbol, str)}
        engine = replace(t5.engines[0], dimensions=dimensions)
        components[name] = replace(t5, inputs=inputs, outputs=outputs, engines=(engine,))
    tokenizers = {"clip": clip, "t5": replace(clip, max_length=512)}
    return json.loads(to_json(replace(manifest, components=components, tokenizers=tokenizers)))


def test_the_documented_tensors_are_taken(whole: Any) -> None:
    manifest = from_json(json.dumps(whole), "here")
    assert missing_component(manifest) is None
    without = {**whole, "guidance_embedding": False}
    del without["components"]["conditioner"]["inputs"][3]
    assert from_json(json.dumps(without), "here")


@pytest.mark.parametrize("name", ["clip", "t5", "conditioner", "transformer", "vae_decoder"])
def test_a_component_that_every_picture_takes_is_missed(whole: Any, name: str) -> None:
    del whole["components"][name]
    assert missing_component(from_json(json.dumps(whole), "here")) == name


CONDITIONER, TRANSFORMER = "components.conditioner", "components.transformer"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("guidance_embedding", False, "conditioner.inputs must be text_embeddings, pooled_embed"),
        (f"{CONDITIONER}.inputs[3]", ABSENT, "conditioner.inputs must be text_embeddings, pool"),
        (f"{CONDITIONER}.inputs[2].name", "sigma", "timestep, guidance, not text_embeddings"),
        (f"{TRANSFORMER}.outputs[0].name", "noise", "outputs must be velocity, not noise"),
        ("components.clip.outputs", [], "outputs must be pooled_embeddings, not none"),
        ("components.t5.inputs[0].dtype", "float32", "t5.inputs.input_ids is float32; it must be"),
        (f"{CONDITIONER}.inputs[2].dtype", "int32", "timestep is int32; it must be float32"),
        (f"{CONDITIONER}.inputs[2].shape", ["N", 1], "timestep has the shape ['N', 1]; it must"),
        (f"{TRANSFORMER}.inputs[0].shape", ["B", "S", 64], "hidden_states has the shape ['B', 'S'"),
        (f"{TRANSFORMER}.inputs[0].shape[2]", "S", "hidden_states has the shape ['B', 'L', 'S']"),
        ("components.vae_decoder.outputs[0].shape[1]", 1, "images has the shape ['B', 1, 'H', 'W"),
        (f"{TRANSFORMER}.inputs[0].shape[2]", 384, "gives 384 for what a task reads, and latents"),
        (f"{TRANSFORMER}.outputs[0].shape[2]", 128, "gives 128 for a token's channels"),
        (f"{TRANSFORMER}.outputs[0].shape[2]", 16, "latents, channels times patch_size squared"),
        ("latents.patch_size", 1, "gives 64 for what a task reads, and latents, for the task text"),
        ("latents.channels", 8, "for what a task reads"),
        (
            "tasks",
            ["fill"],
            "gives 64 for what a task reads, and latents, for the task fill, makes",
        ),
        ("components.vae_encoder.outputs[1].shape[1]", 32, "and latents.channels makes that 16"),
        (f"{TRANSFORMER}.inputs[3].shape[1]", 64, "gives 64 for a head's channels, and the sum"),
        ("rope.axes_dims", [16, 56, 64], "makes that 136"),
        ("rope.axes_dims", [128], "rows and columns take two axes"),
        (f"{TRANSFORMER}.inputs[1].shape[2]", 512, "for the transformer's width, and components.c"),
        (f"{TRANSFORMER}.inputs[2].shape[1]", 41, "gives 41 for the modulation's rows"),
        ("components.t5.outputs[0].shape[2]", 128, "for T5's width"),
        ("components.clip.outputs[0].shape[1]", 96, "for CLIP's width"),
        ("tokenizers.clip.max_length", 248, "gives 77 for CLIP's tokens, and tokenizers.clip.max_"),
        ("tokenizers.t5.max_length", 256, "is 512; tokenizers.t5 makes 2 to 256 tokens"),
        (f"{TRANSFORMER}.engines", [], "is empty; nothing can run it"),
        ("defaults.height", 8192, "is 16 to 4096; defaults.height needs 8192"),
        ("defaults.num_inference_steps", 2000, "dimensions.N is 1 to 1000; defaults.num_inference"),
        (
            "defaults.max_sequence_length",
            513,
            "defaults.max_sequence_length is 513; tokenizers.t5 m",
        ),
        (
            "components.t5.engines[0].dimensions.B",
            {"min": 2, "opt": 2, "max": 2},
            "a picture needs",
        ),
        ("components.t5.engines[0].dimensions.B.max", 10**18, "<= max <= 2147483647"),
        (f"{TRANSFORMER}.inputs[0].shape[2]", 10**18, "must be a size from 1 to 2147483647"),
        ("latents.scaling_factor", 1e308, "from 1e-06 to 1e+06"),
        ("latents.scaling_factor", -1e-300, "from 1e-06 to 1e+06"),
        ("latents.shift_factor", -1e308, "from -1e+06 to 1e+06"),
        ("rope.theta", 1e300, "from 1 to 1e+12"),
        ("rope.theta", 1e-300, "from 1 to 1e+12"),
        ("schedule.shift", 1e308, "from 1e-06 to 1e+06"),
        ("schedule.max_shift", 1e308, "from -80 to 80"),
        ("schedule.max_shift", 800.0, "from -80 to 80"),
        ("schedule.base_shift", -1e5, "schedule.base_shift is -100000; it must be from -80"),
        ("schedule.max_image_seq_len", 260, "for a picture of the default size: it must be from"),
        ("schedule.shift_terminal", 1.0, "null, or from 0 to less than 1"),
        ("schedule.shift_terminal", -0.5, "null, or from 0 to less than 1"),
        ("latents.spatial_factor", 4, "dimensions.h"),
        ("latents.spatial_factor", 64, "dimensions.h"),
        (
            "components.vae_encoder.engines[0].dimensions.w.opt",
            127,
            "dimensions.w does not fit W: latents.spatial_factor makes it 8 times as large",
        ),
        ("defaults.max_sequence_length", 1, "is 1; tokenizers.t5 makes 2 to 512 tokens"),
        ("defaults.guidance_scale", 1e300, "from 0 to 1e+06"),
    ],
)
def test_what_would_fail_in_the_middle_of_a_picture_is_refused(
    whole: Any, where: str, value: object, message: str
) -> None:
    holder, key = _place(whole, where)
    if value is ABSENT:
        del holder[key]
    else:
        holder[key] = value
    with pytest.raises(BundleError) as caught:
        from_json(json.dumps(whole), "bundle/fluxdeploy.json")
    assert message in str(caught.value)


def test_a_terminal_level_takes_two_steps(whole: Any) -> None:
    whole["schedule"]["shift_terminal"] = 0.1
    assert from_json(json.dumps(whole), "here")
    whole["defaults"]["num_inference_steps"] = 1
    with pytest.raises(BundleError, match=r"one step cannot reach schedule\.shift_terminal"):
        from_json(json.dumps(whole), "here")


def test_a_linear_shift_of_no_picture_is_refused(whole: Any) -> None:
    whole["schedule"] |= {"time_shift_type": "linear", "base_shift": -1.0, "max_shift": 0.0}
    with pytest.raises(BundleError, match="make a shift of 0 for a picture of the default size"):
        from_json(json.dumps(whole), "here")


def test_parsing_leaves_no_field_unchecked(manifest: Manifest) -> None:
    """A value of every JSON type in every field: a manifest or a BundleError, nothing else."""
    plain = json.loads(to_json(manifest))
    values = (None, True, 0, -1, 2.5, "", "x", [], [1], {}, {"x": 1})

    def visit(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            kept = node[key]
            for value in values:
                node[key] = copy.deepcopy(value)
                with contextlib.suppress(BundleError):
                    assert isinstance(from_json(json.dumps(plain), "here"), Manifest)
            node[key] = kept
            if isinstance(kept, (dict, list)):
                visit(kept)

    visit(plain)


def test_ordinary_paths_are_allowed() -> None:
    for path in ("a", "onnx/weights/x-00001-of-00002.safetensors", "a..b/c.", "ü/日本"):
        assert path_problem(path) is None


HIDDEN = (
    "\x1b[2J",
    "a\x07",
    "a\rb",
    "\x9b31m",
    "\x7f",
    "a\u202eb",
    "\u2066a",
    "a\u200f",
    "a\u2028b",
)
PLACES = (
    "variant",
    "components.t5.key",
    "components.t5.inputs[0].name",
    "components.t5.engines[0].runtime_version",
    "components.t5.golden.path",
    "tokenizers.clip.path",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_text_that_acts_on_a_terminal_is_refused(
    manifest: Manifest, place: str, hidden: str
) -> None:
    refusal = _refusal(manifest, place, hidden)
    assert f"{place} is {hidden!a}, which holds a control character" in refusal
    assert refusal.isprintable()


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("place", ["components", "tokenizers", "", "components.t5"])
def test_names_that_act_on_a_terminal_are_refused(
    manifest: Manifest, place: str, hidden: str
) -> None:
    plain = json.loads(to_json(manifest))
    holder = plain
    for step in filter(None, place.split(".")):
        holder = holder[step]
    holder[hidden] = {}
    with pytest.raises(BundleError, match="which holds a control character") as caught:
        from_json(json.dumps(plain), "bundle/fluxdeploy.json")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("hidden", HIDDEN)
def test_provenance_may_hold_any_text(manifest: Manifest, hidden: str) -> None:
    free = replace(manifest, provenance={"checkpoint": {hidden: [hidden]}})
    assert from_json(to_json(free), "here") == free


@pytest.mark.parametrize("text", ["größer", "模型", "ما", "a\u00a0b", "👩\u200d👧", "e\u0301"])
def test_text_of_all_languages_is_read(manifest: Manifest, text: str) -> None:
    assert from_json(to_json(replace(manifest, variant=text)), "here").variant == text


@pytest.mark.parametrize("place", ["provenance.tools", "variant", "components.t5.files"])
@pytest.mark.parametrize("depth", [32, 300, 900])
def test_deep_nesting_is_refused(manifest: Manifest, place: str, depth: int) -> None:
    value: Any = []
    for _ in range(depth):
        value = [value]
    assert "is nested more than 32 deep" in _refusal(manifest, place, value)
