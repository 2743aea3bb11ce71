"""Every reader of files that others made, with real small files to damage.

A reader gets damaged input and may do two things: read it, or raise an error of ours.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.mutations import EXTREMES, damaged_bytes, damaged_json, damaged_one_of

__all__ = ["READERS", "Reader"]

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "fluxdeploy/demo/checkpoints/dev"
PROMPTS = [
    "",
    "a red circle above a blue square",
    "Ünï <extra_id_3> <|endoftext|> 👩‍👧 ﷺ" + "a" * 300,
]


@dataclass(frozen=True)
class Reader:
    """`inputs` are damaged; `read` takes one, and raises only errors of ours.

    first: what is read before the limits are set, so that all imports are done.
    """

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], object]
    first: Any


Make = Callable[[Path], Reader]
"""Prepares a reader in an empty folder, where it may write."""


def _of_file(
    path: Path,
    seeds: list[bytes],
    read: Callable[[Path], object],
    damaged: Callable[[list[bytes]], st.SearchStrategy[bytes]] = damaged_bytes,
) -> Reader:
    """A reader of one file, which is written anew each time."""

    def read_bytes(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return Reader(damaged(seeds), read_bytes, seeds[0])


def _json_or_bytes(seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.one_of(damaged_json(seeds), damaged_bytes(seeds))


def safetensors(folder: Path) -> Reader:
    from fluxdeploy.bundle.tensorfile import TensorFileWriter, read_header, read_tensor

    declared = [("a.weight", "F32", (2, 3)), ("b", "BF16", (4,)), ("c", "F8_E4M3", (8,)),
                ("d", "BOOL", (3,)), ("e", "I64", ()), ("f", "F4", (4,)),
                ("g", "F16", (0, 7))]  # fmt: skip
    sizes = [24, 8, 8, 3, 8, 2, 0]
    with TensorFileWriter(folder / "seed", declared, {"format": "pt"}) as writer:
        for size in sizes:
            writer.write(bytes(range(size)))
    demo = (DEMO / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    seeds = [(folder / "seed").read_bytes(), demo[: 8 + int.from_bytes(demo[:8], "little")]]

    def read(path: Path) -> None:
        file = read_header(path)
        for name in file.tensors:
            read_tensor(file, name)

    return _of_file(folder / "x.safetensors", seeds, read)


def gguf(folder: Path) -> Reader:
    """A small file of each kind of metadata, and of blocks; what is read is widened."""
    import numpy as np

    from exporters.checkpoint.tensors import read_stored
    from tests.support.gguf_file import ARRAY, STRING, U32, GgufFile, GgufTensor, value

    blocks = np.random.default_rng(0).integers(0, 127, 864, np.uint8).tobytes()
    tensors = {
        "double_blocks.0.img_attn.qkv.weight": GgufTensor(12, (256, 3), blocks[:432]),
        "img_in.weight": GgufTensor(8, (32, 3), blocks[:102]),
        "img_in.bias": GgufTensor(0, (3,), blocks[:12]),
        "final_layer.linear.weight": GgufTensor(30, (2, 3), blocks[:12]),
    }
    metadata = {
        "general.architecture": value(STRING, "flux"),
        "general.alignment": value(U32, 32),
        "tokens": value(ARRAY, ["a", "bc", ""], STRING),
        "scores": value(ARRAY, [0.5] * 20, 6),
        "comfy.gguf.orig_shape.img_in.bias": value(ARRAY, [3, 1], 5),
    }
    seeds = [GgufFile(tensors, metadata, version=version).to_bytes() for version in (3, 2)]

    def read(path: Path) -> None:
        for stored in read_stored([path]).values():
            assert stored.read().size == np.prod(stored.shape, dtype=int)

    return _of_file(folder / "x.gguf", seeds, read)


def four_bits(folder: Path) -> Reader:
    """Weights of bitsandbytes, by the JSON beside them: the header is `safetensors`' matter."""
    from exporters.checkpoint.four_bits import attach_blocks
    from exporters.checkpoint.tensors import read_stored
    from fluxdeploy.bundle.tensorfile import TensorFileWriter

    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 64],
             "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}  # fmt: skip
    declared = [("weight", "U8", (96, 1)), ("weight.absmax", "U8", (3,)),
                ("weight.quant_map", "F32", (16,)), ("weight.nested_absmax", "F32", (1,)),
                ("weight.nested_quant_map", "F32", (256,))]  # fmt: skip
    path = folder / "x.safetensors"

    def read(text: bytes) -> None:
        name = "weight.quant_state.bitsandbytes__nf4"
        with TensorFileWriter(path, [*declared, (name, "U8", (len(text),))]) as writer:
            for size in (96, 3, 64, 4, 1024):
                writer.write(bytes(size))
            writer.write(text)
        for stored in attach_blocks(read_stored([path])).values():
            stored.read()

    seed = json.dumps(state).encode()
    return Reader(_json_or_bytes([seed]), read, seed)


def lora(folder: Path) -> Reader:
    import numpy as np

    from fluxdeploy.bundle.tensorfile import TensorFileWriter
    from fluxdeploy.lora import read_lora

    block = "transformer_blocks.0.attn"
    flat = "lora_unet_double_blocks_0_img_attn_qkv"
    linears = {"transformer": {f"{block}.{name}": (8, 8) for name in ("to_q", "to_k", "to_v")}}
    linears["transformer"]["x_embedder"] = (8, 8)
    norms = {f"{block}.norm_q": 8}
    config = '{"transformer.r": 2, "transformer.lora_alpha": 4}'
    seeds = []
    for names, rows, metadata in (
        ((f"{block}.to_q.lora_A.weight", f"{block}.to_q.lora_B.weight"), 8, config),
        ((f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"), 24, "{}"),
    ):
        declared = [(names[0], "F32", (2, 8)), (names[1], "F16", (rows, 2))]
        path = folder / f"{rows}.safetensors"
        with TensorFileWriter(path, declared, {"lora_adapter_metadata": metadata}) as writer:
            writer.write(bytes(range(64)))
            writer.write(bytes(range(4 * rows)))
        seeds.append(path.read_bytes())

    control = {
        "img_in.lora_A.weight": (2, 16),
        "img_in.lora_B.weight": (8, 2),
        "img_in.lora_B.bias": (8,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (8,),
    }
    path = folder / "control.safetensors"
    with TensorFileWriter(path, [(n, "F32", s) for n, s in control.items()]) as writer:
        for shape in control.values():
            writer.write(bytes(4 * math.prod(shape)))
    seeds.append(path.read_bytes())

    def read(path: Path) -> None:
        lora = read_lora(path, linears, norms=norms)
        for change in lora.changes.get("transformer", {}).values():
            assert change.up().shape == (8, change.rank)
            assert change.down().shape == (change.rank, change.width)
        for vector in (*lora.biases.get("transformer", {}).values(), *lora.norms.values()):
            assert vector.add_to(np.zeros(8, np.float32), 1.0).shape == (8,)

    return _of_file(folder / "x.safetensors", seeds, read)


def manifest(folder: Path) -> Reader:
    from fluxdeploy.bundle import open_bundle
    from fluxdeploy.bundle.manifest import PreviewSpec
    from tests.support.small_bundle import small_files, small_manifest, write_small_bundle

    preview = PreviewSpec(((0.25, 0.0, -0.5),) * 16, (0.5, 0.5, 0.5))
    whole = replace(small_manifest(small_files()), preview=preview)
    root = write_small_bundle(folder / "bundle", small_files(), whole)
    path = root / "fluxdeploy.json"
    return _of_file(path, [path.read_bytes()], lambda _: open_bundle(root), _json_or_bytes)


def hash_cache(folder: Path) -> Reader:
    from fluxdeploy.bundle.files import HashCache

    files = [folder / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(b"some bytes")
        os.utime(file, (1_600_000_000, 1_600_000_000))
    HashCache(folder).hash_files(files)
    path = folder / "hashes.json"
    return _of_file(
        path, [path.read_bytes()], lambda _: HashCache(folder).hash_files(files), _json_or_bytes
    )


def staging(folder: Path) -> Reader:
    from fluxdeploy.build.staging import Staging
    from tests.support.small_bundle import small_files, small_manifest, write_small_bundle

    files, made = small_files(), small_manifest(small_files())
    root = folder / "bundle"
    with Staging(root) as stage:
        write_small_bundle(stage.root, files, made)
        stage.record("t5", made.components["t5"].key, [f for f in files if "t5" in f])
        stage.record("tokenizer.clip", "k", ["tokenizers/clip.json"])
        kept = {
            path.relative_to(stage.root).as_posix(): path.read_bytes()
            for path in stage.root.rglob("*")
            if path.is_file()
        }
    names = [name for name in kept if name.startswith(".artifacts/")]
    building = folder / ".bundle.building"

    def read(damaged: Mapping[str, bytes]) -> None:
        for name, data in {**kept, **damaged}.items():
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            (building / name).write_bytes(data)
        with Staging(root) as stage:
            for artifact, record in (("t5", made.components["t5"]), ("tokenizer.clip", None)):
                stage.finished(artifact, "k" if record is None else record.key)

    return Reader(damaged_one_of({**kept, "fluxdeploy.json": kept["fluxdeploy.json"]},
                                 [*names, "fluxdeploy.json"]), read, {})  # fmt: skip


def tokenizer(folder: Path) -> Reader:
    """At run time: one tokenizer.json of a bundle, loaded and used."""
    from types import SimpleNamespace

    from fluxdeploy.bundle.manifest import FileRecord, TokenizerRecord
    from fluxdeploy.text.bundle import load_tokenizers

    seeds = [(DEMO / name / "tokenizer.json").read_bytes() for name in ("tokenizer", "tokenizer_2")]
    # The pieces of a vocabulary are as good as equal to each other: most damage goes elsewhere.
    document = json.loads(seeds[1])
    document["model"]["vocab"] = document["model"]["vocab"][:100]
    seeds.append(json.dumps(document).encode())
    files = (FileRecord("x.json", 0, "0" * 64),)
    record = TokenizerRecord("x.json", 77, 0, (1,), (2,), "right", "right", files)
    stub: Any = SimpleNamespace(
        root=folder,
        path=folder.joinpath,
        read=lambda file: (folder / file.path).read_bytes(),
        manifest=SimpleNamespace(tokenizers={"clip": record, "t5": record}),
    )

    def read(_: Path) -> None:
        loaded = load_tokenizers(stub)
        loaded.clip(PROMPTS)
        loaded.clip_tokenizer.count(PROMPTS[-1])

    return _of_file(folder / "x.json", seeds, read, _json_or_bytes)


def picture_metadata(folder: Path) -> Reader:
    import numpy as np

    from fluxdeploy.host.pictures import PictureMetadata, read_metadata, save_picture, to_pil

    (image,) = to_pil(np.zeros((1, 16, 16, 3), np.float32))
    seeds = []
    for prompt in ("a fox", "Ω" * 400):
        numbers = (1.0, 3, 0, 4, 3.5, None, None, 77, 16, 16, *(None,) * 5)
        made = PictureMetadata(prompt, None, None, None, *numbers, "0" * 64, "1")
        save_picture(image, folder / "seed.png", made)
        seeds.append((folder / "seed.png").read_bytes())
    return _of_file(folder / "x.png", seeds, read_metadata)


def pictures(folder: Path) -> Reader:
    import numpy as np
    from PIL import Image

    from fluxdeploy.host.input_images import open_image, open_mask, to_masks, to_pixels

    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    image, seeds = Image.fromarray(pixels), []
    for kind, mode in (("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"),
                       ("JPEG", "RGB"), ("JPEG", "L"),
                       ("WEBP", "RGB"), ("GIF", "P"), ("TIFF", "RGB"), ("TIFF", "CMYK"),
                       ("BMP", "RGB"), ("PPM", "RGB"), ("PPM", "1")):  # fmt: skip
        stream, converted = io.BytesIO(), image.convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            converted = Image.fromarray(np.asarray(converted).astype(np.uint16) * 257)
        exif = Image.Exif()
        exif[0x0112] = 6  # turned
        turned = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        converted.save(stream, kind, **turned)
        seeds.append(stream.getvalue())

    def read(path: Path) -> None:
        opened, _ = open_image(path)
        to_pixels(opened, 16, 16)
        mask, _ = open_mask(path)
        to_masks(mask, 16, 16)

    return _of_file(folder / "x.png", seeds, read)


def bench_report(folder: Path) -> Reader:
    from fluxdeploy.bench.report.record import from_json

    results = json.loads((ROOT / "benchmarks/results/latency.json").read_text())
    seed = json.dumps(results[next(iter(results))]).encode()
    inputs = _json_or_bytes([seed]).map(lambda data: data.decode("utf-8", "replace"))
    return Reader(inputs, from_json, seed.decode())


def fusion_report(folder: Path) -> Reader:
    from engines.tensorrt.fusion import FusionReport, Kernel

    kernel = Kernel("k", "gemm", ("fp8",), ("bf16",), ("bf16",))
    made = FusionReport((kernel, kernel), {"a": "fp8"}, {"b": "bf16"}, ("c",), ("d",), 3, 4)
    seed = made.as_json()
    inputs = _json_or_bytes([seed.encode()]).map(lambda data: data.decode("utf-8", "replace"))
    return Reader(inputs, FusionReport.from_json, seed)


def prompts(folder: Path) -> Reader:
    from exporters.calibrate.range_file import read_prompts

    seeds = [
        "a fox\n\nein Fuchs, groß\r\n".encode(),
        "\ufeffone\n".encode(),
        "x\n".encode("utf-16"),
    ]
    return _of_file(folder / "prompts.txt", seeds, read_prompts)


def _headers(folder: Path) -> Path:
    """The demo's checkpoint with zeros for weights, which take no room."""

    def copy(source: str, target: str) -> None:
        if not source.endswith(".safetensors"):
            shutil.copyfile(source, target)
            return
        with open(source, "rb") as file:
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
        with open(target, "wb") as file:
            file.write(length + header)
            file.truncate(os.path.getsize(source))

    return Path(shutil.copytree(DEMO, folder / "checkpoint", copy_function=copy))


def checkpoint(folder: Path) -> Reader:
    """Configs, index and headers: all that `plan` asks a checkpoint for."""
    from exporters.checkpoint import open_checkpoint

    root = _headers(folder)
    weights = "diffusion_pytorch_model.safetensors"
    shard = f"{weights[:-12]}-00001-of-00001.safetensors"
    os.rename(root / "transformer" / weights, root / "transformer" / shard)
    with open(root / "transformer" / shard, "rb") as file:
        names = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: shard for name in names if name != "__metadata__"},
    }
    (root / "transformer" / f"{weights}.index.json").write_text(json.dumps(index))
    files, tails = {}, {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and "tokenizer" not in name:
            with open(path, "rb") as file:
                data = file.read(8)
                size = int.from_bytes(data, "little") if path.suffix == ".safetensors" else -1
                files[name] = data + file.read(size)
            tails[name] = path.stat().st_size - len(files[name])
    names = [n for n in files if n.endswith(".json")] * 2 + list(files)

    def read(damaged: Mapping[str, bytes]) -> None:
        try:
            for name, data in damaged.items():
                _write_sparse(root / name, data, tails[name])
            opened = open_checkpoint(root)
            for part in ("transformer", "vae", "clip", "t5"):
                if part in opened.parts:
                    getattr(opened, part)
            for what in ("schedule", "defaults", "latents", "rope", "files", "max_text_tokens"):
                getattr(opened, what)
        finally:
            for name in damaged:
                _write_sparse(root / name, files[name], tails[name])

    return Reader(damaged_one_of(files, names), read, {})


def _write_sparse(path: Path, data: bytes, zeros: int) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(len(data) + zeros)


def tokenizer_folder(folder: Path) -> Reader:
    from exporters.synthetic.small_tokenizers import write_tokenizers
    from exporters.tokenizers import canonical_tokenizer

    kinds = {"tokenizer": "clip", "tokenizer_2": "t5"}
    files = {}
    for form in ("json", "model"):
        write_tokenizers(folder / form, form=form)
        for path in (folder / form).rglob("*"):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
    for name in list(files):
        if name.endswith("tokenizer.json"):
            document = json.loads(files[name])
            if isinstance(document["model"]["vocab"], list):
                document["model"]["vocab"] = document["model"]["vocab"][:300]
                document["added_tokens"] = document["added_tokens"][:4]
                files[name] = json.dumps(document).encode()
                (folder / name).write_bytes(files[name])

    def read(damaged: Mapping[str, bytes]) -> None:
        ((name, data),) = damaged.items()
        path = folder / name
        try:
            path.write_bytes(data)
            canonical_tokenizer(path.parent, kinds[path.parent.name])
        finally:
            path.write_bytes(files[name])

    first = next(name for name in files if name.endswith("spiece.model"))
    return Reader(damaged_one_of(files, list(files)), read, {first: files[first]})


def ranges(folder: Path) -> Reader:
    from exporters.calibrate.range_file import (
        CalibrationFile,
        read_calibration,
        write_calibration,
    )
    from exporters.calibrate.ranges import ActivationRanges, attentions, linears
    from exporters.calibrate.trajectory import Calibration
    from exporters.checkpoint import open_checkpoint
    from exporters.components.registry import COMPONENTS

    opened = open_checkpoint(_headers(folder))
    chain, _ = COMPONENTS["transformer"].source(opened, "fp32")
    heads = dict.fromkeys(attentions(chain), 1.5)
    calibration = Calibration(("", "a fox"), 7, ((64, 96),), 4, 3.5)
    made = ActivationRanges(
        "0" * 64, calibration, dict.fromkeys(linears(chain), 2.5), heads, heads, heads
    )
    path = folder / "ranges.json"
    write_calibration(CalibrationFile(made.checkpoint, made, {}), path)
    return _of_file(
        path, [path.read_bytes()], lambda p: read_calibration(p, opened, "0" * 64), _json_or_bytes
    )


def arguments(folder: Path) -> Reader:
    """Command lines: every command and option, with values that nobody means."""
    import click
    from click.testing import CliRunner

    import exporters.export
    import exporters.quality.calibrate
    import fluxdeploy.build.components
    from fluxdeploy.cli import main
    from fluxdeploy.errors import FluxDeployError

    def begin(*_: object, **__: object) -> None:
        raise FluxDeployError("The work begins.")

    for module, name in (
        (fluxdeploy.build.components, "make_component"),
        (exporters.export, "export_component"),
        (exporters.quality.calibrate, "calibrate"),
    ):
        setattr(module, name, begin)
    (folder / "empty").mkdir()
    (folder / "text.png").write_bytes(b"text")
    os.mkfifo(folder / "pipe")
    context = click.Context(main)
    options = {
        name: [o for p in main.get_command(context, name).params for o in p.opts]  # type: ignore[union-attr]
        for name in main.list_commands(context)
    }
    paths = [str(folder / name) for name in ("empty", "text.png", "pipe", "none", "none/x.png")]
    plain = [str(value) for value in EXTREMES if isinstance(value, (int, float, str))]
    # The system has no other arguments; half a character, for one, is none.
    plain = [word for word in plain if len(word) < 300 and not set(word) & {"\x00", "/", "\ud800"}]
    values = st.one_of(
        st.sampled_from([*paths, *plain]),
        st.sampled_from(["512x512", "1x0", "cpu", "cuda", "fp8", "auto", "onnxruntime", "t5=int8"]),
        # No paths: as they are arguments, files there may be written.
        st.text(st.characters(exclude_characters="/.~\x00"), max_size=8),
    )

    def words(name: str) -> st.SearchStrategy[list[str]]:
        word = st.one_of(st.sampled_from(options[name] or ["--help"]), values)
        return st.lists(word, max_size=7).map(lambda rest: [name, *rest])

    inputs = st.sampled_from(list(options)).flatmap(words)

    def read(line: list[str]) -> None:
        result = CliRunner().invoke(main, line, prog_name="fluxdeploy")
        if isinstance(result.exception, Exception) or "bug in fluxdeploy" in result.output:
            raise AssertionError(f"{line}: {result.output[-300:]}") from result.exception
        if result.exit_code:
            raise FluxDeployError(result.output)

    # Nothing of this machine's shall be found where a command looks for its defaults.
    os.chdir(folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder)}
    return Reader(inputs, read, ["plan"])


def emulated_graph(folder: Path) -> Reader:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    from engines.emulate.graph import emulate
    from fluxdeploy.errors import EngineError
    from fluxdeploy.native import native_errors

    bf16, e4m3, e2m1 = TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
    block = {"axis": -1, "block_size": 16}
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=bf16),
        helper.make_node(
            "TRT_FP4DynamicQuantize", ["x16", "one"], ["q", "s"],
            domain="trt", scale_type=e4m3, **block,
        ),
        helper.make_node("DequantizeLinear", ["s", "one"], ["steps"]),
        helper.make_node("DequantizeLinear", ["q", "steps"], ["wide"], **block),
        helper.make_node("DequantizeLinear", ["w", "scale"], ["weight"]),
        helper.make_node("MatMul", ["wide", "weight"], ["y"]),
    ]  # fmt: skip
    types = {"x16": bf16, "q": e2m1, "s": e4m3, "steps": TensorProto.FLOAT, "wide": bf16,
             "weight": bf16}  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 16]) for name in "xy")
    weights = [
        numpy_helper.from_array(np.float32(1), "one"),
        helper.make_tensor("w", e4m3, [16, 16], bytes(256), raw=True),
        helper.make_tensor("scale", bf16, [], bytes(2), raw=True),
    ]
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], weights, value_info=values)
    seed = helper.make_model(graph).SerializeToString()

    def read(data: bytes) -> None:
        with native_errors(EngineError, "the graph"):
            emulate(data)

    return Reader(damaged_bytes([seed]), read, seed)


def native_engine(folder: Path) -> Reader:
    from engines.native.file import read_engine
    from engines.native.works import read_works
    from tests.support.native_file import SMALL_PLAN, write_small_engine

    path = write_small_engine(folder / "engine")
    plans = damaged_json([SMALL_PLAN.to_json().encode()])

    def read(damaged: bytes | dict[str, bytes]) -> None:
        if isinstance(damaged, dict):
            write_small_engine(path, damaged["plan"].decode())
        else:
            path.write_bytes(damaged)
        file = read_engine(path)
        file.cubins()
        read_works(file.plan, file.metadata)

    seed = path.read_bytes()
    inputs = st.one_of(damaged_bytes([seed]), plans.map(lambda plan: {"plan": plan}))
    return Reader(inputs, read, seed)


READERS: Mapping[str, Make] = {
    make.__name__: make
    for make in (
        safetensors, gguf, four_bits, lora, manifest, hash_cache, staging, tokenizer,
        picture_metadata, pictures, bench_report, fusion_report, prompts, checkpoint,
        tokenizer_folder, ranges, arguments,
        emulated_graph, native_engine,
    )
}  # fmt: skip
"""By the name that reports call them."""
