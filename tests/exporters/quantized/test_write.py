"""The weight files of a quantized export: their names and sizes, reruns, and memory."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporters.check.readback import read_linears
from exporters.checkpoint import Checkpoint
from exporters.checkpoint.tensors import StoredTensor, read_stored
from exporters.formats import FORMATS, Packed
from exporters.weights.bind import Ledger
from exporters.weights.write import WrittenTensor, shards, write_files, write_tensors
from fluxdeploy.bundle.tensorfile import DTYPE_BITS, read_header
from fluxdeploy.errors import BundleError, CheckpointError
from tests.exporters.quantized.conftest import LINEARS, ExportInto, Quantized, open_short

FP8 = Packed(FORMATS["fp8"], ir.DataType.FLOAT)
INT8 = Packed(FORMATS["int8"], ir.DataType.FLOAT)
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


class Finished(Ledger):
    """A ledger in memory."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def finished(self, file: str) -> bool:
        return file in self.files

    def record(self, file: str, sha256: str) -> None:
        assert file not in self.files
        self.files[file] = sha256

    def stored_as(self, file: str) -> str:
        return file


def tensor_bytes(path: Path) -> int:
    """What the tensors beside a graph take."""
    files = (path.parent / "weights").iterdir()
    return sum(e.nbytes for file in files for e in read_header(file).tensors.values())


def test_files_are_of_moderate_size(
    export_into: ExportInto, quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = quantized("fp8-weights", "bf16")
    shard = 100_000
    monkeypatch.setattr("exporters.weights.write._SHARD", shard)
    split = export_into(tmp_path, "fp8-weights", "bf16")
    names = sorted(file.name for file in (tmp_path / "weights").iterdir())
    count = len(names)
    assert count > 5
    assert names == [
        f"transformer.fp8-weights-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
    ]
    sizes: list[int] = []
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        entries = read_header(tmp_path / "weights" / name).tensors
        sizes.append(sum(entry.nbytes for entry in entries.values()))
        tensors |= load_file(tmp_path / "weights" / name)
        assert sizes[-1] - max(entry.nbytes for entry in entries.values()) < 1.01 * shard
    assert min(sizes[:-1]) >= shard
    (whole,) = (graph.parent / "weights").iterdir()
    assert whole.name == "transformer.fp8-weights.safetensors"
    expected = load_file(whole)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
    found, same = read_linears(split), read_linears(graph)
    assert all(torch.equal(found[n].dequantized(), same[n].dequantized()) for n in LINEARS)


class Killed(Exception):
    """Takes the place of a signal."""


def test_a_rerun_keeps_the_files_that_are_whole(
    export_into: ExportInto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.weights.write._SHARD", 200_000)
    ledger = Finished()

    def write(path: Path, *arguments: object) -> str:
        if "-00003-of-" in path.name:
            raise Killed
        return write_tensors(path, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("exporters.weights.write.write_tensors", write)
        with pytest.raises(Killed):
            export_into(tmp_path / "killed", "fp8-weights", ledger=ledger)
    weights = tmp_path / "killed" / "weights"
    before = {file.name: file.stat() for file in weights.iterdir()}
    assert before.keys() == ledger.files.keys()
    assert [name.split("-of-")[0][-1] for name in sorted(before)[:2]] == ["1", "2"]
    assert not any("-00003-of-" in name for name in before)

    path = export_into(tmp_path / "killed", "fp8-weights", ledger=ledger)
    for name, status in before.items():
        after = (weights / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert len(ledger.files) > len(before)
    fresh = export_into(tmp_path / "fresh", "fp8-weights")
    assert path.read_bytes() == fresh.read_bytes()
    files = sorted(p.name for p in weights.iterdir())
    assert files == sorted(ledger.files)
    for name in files:
        data = (weights / name).read_bytes()
        assert data == (fresh.parent / "weights" / name).read_bytes()
        assert ledger.files[name] == hashlib.sha256(data).hexdigest()


def test_a_quantized_export_is_half_as_large_and_links_nothing(
    quantized: Quantized, opened: Checkpoint
) -> None:
    path = quantized("fp8", "bf16")
    sources = {file.stat().st_ino for file in opened.files}
    for file in (path.parent / "weights").iterdir():
        assert file.stat().st_nlink == 1
        assert file.stat().st_ino not in sources
    stored = opened.part("transformer").weights
    in_bf16 = in_fp8 = 0
    elsewhere = ("time_text_embed", "context_embedder", "norm_out")
    for name, tensor in stored.items():
        if name.startswith(elsewhere) or ("norm" in name and ".linear." in name):
            continue
        count = int(np.prod(tensor.shape))
        linear = name.removesuffix(".weight") in LINEARS
        in_bf16 += 2 * count
        # A byte each, and a scale a row.
        in_fp8 += count + 2 * tensor.shape[0] if linear else 2 * count
    assert tensor_bytes(path) == in_fp8 < 0.55 * in_bf16


def test_weights_that_stay_keep_their_stored_type(
    export_into: ExportInto, source: Path, tmp_path: Path
) -> None:
    """A bfloat16 checkpoint around which the graph computes in float32."""
    folder = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    tensors = {name: t.bfloat16() for name, t in load_file(folder / TRANSFORMER).items()}
    (folder / TRANSFORMER).unlink()
    save_file(tensors, folder / TRANSFORMER)
    path = export_into(tmp_path / "out", "int8-weights", checkpoint=open_short(folder))
    (file,) = (path.parent / "weights").iterdir()
    found = read_header(file).tensors
    assert found["x_embedder.weight"].dtype == "BF16"
    assert found["transformer_blocks.0.attn.to_q.weight"].dtype == "I8"
    assert found["transformer_blocks.0.attn.to_q.weight.scale"].dtype == "F32"


def test_scaled_fp8_checkpoints_are_quantized_anew(
    export_into: ExportInto, source: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "checkpoint"))
    tensors = load_file(folder / TRANSFORMER)
    for linear in LINEARS:
        weight = tensors[f"{linear}.weight"]
        scale = weight.abs().max() / 448
        tensors[f"{linear}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{linear}.scale_weight"] = scale
    (folder / TRANSFORMER).unlink()
    save_file(tensors, folder / TRANSFORMER)
    path = export_into(tmp_path / "out", "int8-weights", checkpoint=open_short(folder))
    found = read_linears(path)
    for linear in LINEARS:
        weight = tensors[f"{linear}.weight"].float() * tensors[f"{linear}.scale_weight"]
        error = (found[linear].dequantized().T - weight).abs()
        assert (error <= 0.501 * weight.abs().amax(1, keepdim=True) / 127).all()


def stored_tensors(folder: Path, count: int, rows: int, columns: int) -> list[StoredTensor]:
    tensors = {f"layer.{i}": torch.randn(rows, columns) for i in range(count)}
    save_file(tensors, folder / "source.safetensors")
    return list(read_stored([folder / "source.safetensors"]).values())


def ignore(*_: object) -> None:
    pass


def peak_memory(path: Path, tensors: list[WrittenTensor]) -> int:
    """Bytes that NumPy had at once while a file was written."""
    tracemalloc.start()
    write_files(path.parent, {path.name: tensors}, ignore, ignore)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.weights.write._CHUNK", 1 << 14)
    stored = stored_tensors(tmp_path, 6, 512, 1024)
    # A quantized one as it will be stored, and parts of what it is made from.
    for name in FORMATS:
        packed = Packed(FORMATS[name], ir.DataType.BFLOAT16)
        quantized = [WrittenTensor(tensor.name, tensor, packed.dtype, packed) for tensor in stored]
        assert peak_memory(tmp_path / f"{name}.safetensors", quantized) < 1.5 * 512 * 1024
    # Of what is only converted it is a part of one.
    size = stored[0].nbytes
    converted = [WrittenTensor(tensor.name, tensor, "BF16") for tensor in stored]
    assert peak_memory(tmp_path / "converted.safetensors", converted) < 0.3 * size
    found = load_file(tmp_path / "converted.safetensors")
    expected = load_file(tmp_path / "source.safetensors")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_progress_hears_of_every_byte(tmp_path: Path) -> None:
    stored = stored_tensors(tmp_path, 3, 8, 16)
    tensors = [
        WrittenTensor("layer.0", stored[0], "F8_E4M3", FP8),
        WrittenTensor("layer.1", stored[1], "BF16"),
        WrittenTensor("layer.2", stored[2], "F32"),
    ]
    heard: list[int] = []
    write_tensors(tmp_path / "out.safetensors", tensors, heard.append)
    sizes = [8 * 16 + 8 * 4, 8 * 16 * 2, 8 * 16 * 4]
    assert [tensor.nbytes for tensor in tensors] == sizes
    assert sum(heard) == sum(sizes)
    entries = read_header(tmp_path / "out.safetensors").tensors
    assert {name: (e.dtype, e.shape) for name, e in entries.items()} == {
        "layer.0": ("F8_E4M3", (16, 8)),
        "layer.0.scale": ("F32", (8,)),
        "layer.1": ("BF16", (8, 16)),
        "layer.2": ("F32", (8, 16)),
    }
    assert all(e.nbytes == np.prod(e.shape) * DTYPE_BITS[e.dtype] // 8 for e in entries.values())


def test_no_tensors_make_no_file() -> None:
    assert list(shards("part", [])) == []


def test_a_damaged_weight_leaves_no_file(tmp_path: Path) -> None:
    (stored,) = stored_tensors(tmp_path, 1, 8, 16)
    tensors = load_file(tmp_path / "source.safetensors")
    tensors["layer.0"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "damaged.safetensors")
    damaged = dataclasses.replace(stored, file=tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError, match=r"layer\.0 holds NaN"):
        write_tensors(
            tmp_path / "out.safetensors",
            [WrittenTensor("layer.0", damaged, "I8", INT8)],
            lambda _: None,
        )
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"source.safetensors", "damaged.safetensors"}


def quantized_files(
    stored: Sequence[StoredTensor], each: int = 1
) -> dict[str, list[WrittenTensor]]:
    """Files of `each` tensors, in INT8."""
    tensors = [WrittenTensor(tensor.name, tensor, "I8", INT8) for tensor in stored]
    starts = range(0, len(tensors), each)
    return {f"{start // each}.safetensors": tensors[start : start + each] for start in starts}


def damaged(stored: StoredTensor) -> StoredTensor:
    """The same tensor with a NaN, in a file of its own."""
    values = torch.from_numpy(stored.read().reshape(stored.shape))
    values[-1, -1] = torch.nan
    file = stored.file.with_name(f"damaged {stored.name}.safetensors")
    save_file({stored.name: values}, file)
    return read_stored([file])[stored.name]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def cores() -> Iterator[None]:
    """Four cores, on any machine and whatever OMP_NUM_THREADS says."""
    usual = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(usual)


@pytest.mark.usefixtures("cores")
def test_files_side_by_side_are_those_written_in_turn(tmp_path: Path, out: Path) -> None:
    files = quantized_files(stored_tensors(tmp_path, 24, 64, 32), each=3)
    threads, inside, heard = set(), threading.Lock(), 0
    whole: dict[str, str] = {}

    def on_bytes(count: int) -> None:
        nonlocal heard
        assert inside.acquire(blocking=False), "never concurrently"
        threads.add(threading.get_ident())
        time.sleep(0.001)
        heard += count
        inside.release()

    def on_file(name: str, sha256: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        whole[name] = sha256

    write_files(out, files, on_bytes, on_file)
    assert len(threads) > 1
    assert heard == sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    assert whole.keys() == files.keys() == {file.name for file in out.iterdir()}
    for name, tensors in files.items():
        expected = write_tensors(tmp_path / name, tensors, ignore)
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes()
        assert whole[name] == expected == hashlib.sha256((out / name).read_bytes()).hexdigest()


@pytest.mark.usefixtures("cores")
def test_the_first_error_in_order_is_raised_and_earlier_files_are_whole(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_tensors(tmp_path, 20, 16, 8)
    stored[2], stored[3] = damaged(stored[2]), damaged(stored[3])
    later, last = threading.Event(), threading.Event()
    name = re.escape(stored[2].name)

    def write(path: Path, *arguments: object) -> str:
        # File 3 fails first, then file 2, then file 4 notices that it is given up.
        number = int(path.stem)
        if number in (0, 1, 2, 4):
            assert (last if number == 4 else later).wait(timeout=60)
            time.sleep(0.1)
        try:
            return write_tensors(path, *arguments)  # type: ignore[arg-type]
        finally:
            if number in (2, 3):
                (last if number == 2 else later).set()

    monkeypatch.setattr("exporters.weights.write.write_tensors", write)
    whole: list[str] = []
    with pytest.raises(CheckpointError, match=f"Tensor {name} holds NaN"):
        write_files(out, quantized_files(stored), ignore, lambda name, _: whole.append(name))
    left = {file.name for file in out.iterdir()}
    assert {"0.safetensors", "1.safetensors"} <= left == set(whole)
    assert not {"2.safetensors", "3.safetensors"} & left
    assert len(left) < 18, "what follows is given up"


@pytest.mark.usefixtures("cores")
def test_ctrl_c_leaves_whole_files_only(tmp_path: Path, out: Path) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("Ctrl-C reaches the main thread alone")
    files = quantized_files(stored_tensors(tmp_path, 200, 16, 8), each=10)
    heard = 0

    def on_bytes(count: int) -> None:
        nonlocal heard
        heard += count
        if count and heard == count:
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.01)

    whole: list[str] = []
    # Workers of a parallel test run ignore the signal.
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_files(out, files, on_bytes, lambda name, _: whole.append(name))
    finally:
        signal.signal(signal.SIGINT, usual)
    assert heard < sum(tensor.nbytes for tensors in files.values() for tensor in tensors) / 2
    left = {file.name for file in out.iterdir()}
    assert set(whole) <= left <= files.keys()
    for name in left:
        read_header(out / name)


def test_a_full_disk_while_a_file_is_remembered(tmp_path: Path, out: Path) -> None:
    files = quantized_files(stored_tensors(tmp_path, 12, 16, 8))

    def on_file(name: str, sha256: str) -> None:
        raise BundleError("the disk is full")

    with pytest.raises(BundleError, match="the disk is full"):
        write_files(out, files, ignore, on_file)
    assert {file.name for file in out.iterdir()} <= files.keys()


@pytest.mark.usefixtures("cores")
def test_memory_holds_as_many_tensors_as_files_are_written(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporters.weights.write._CHUNK", 1 << 12)
    monkeypatch.setattr("exporters.weights.write._MOST_FILES", 3)
    files = quantized_files(stored_tensors(tmp_path, 24, 256, 512))
    tracemalloc.start()
    write_files(out, files, lambda count: time.sleep(0.001), ignore)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 256 * 512 * 2 < peak < 256 * 512 * 5


@pytest.mark.usefixtures("cores")
def test_torch_has_all_its_threads_afterwards(tmp_path: Path, out: Path) -> None:
    write_files(out, quantized_files(stored_tensors(tmp_path, 4, 16, 8)), ignore, ignore)
    counts = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert counts == [4, 4]
