"""Building TensorRT engines, with `tensorrt` or `tensorrt_rtx` as the module."""

from __future__ import annotations

import gc
import re
import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from engines.base import BuildSettings, EngineSource
from engines.tensorrt.fusion import FusionReport, Products, read_report
from fluxdeploy.bundle.files import disk_errors, replacing, write_atomic
from fluxdeploy.bundle.manifest import DimensionRange, TensorSpec
from fluxdeploy.errors import BundleError, EngineError, UsageError
from fluxdeploy.progress import Progress, Task

__all__ = ["build_engine", "check_profiles"]

_CHUNK = 64 << 20
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")

# Where there is no driver the builder says so after every failure, whatever the reason was.
_NOISE = re.compile(r"catchCudaError|CUDA driver version is insufficient|Reading CUDA GPU", re.I)

_REMEDIES = (
    (
        "HW-specific datatypes",
        "a type in the graph is not one of the target's: choose another precision or target",
    ),
    ("is not supported for Turing", "choose fp16, or another target than sm75"),
    ("for Turing (SM75)", "choose fp16, or another target than sm75"),
    ("within workspace limit", "raise the builder's memory limit, or lower the largest size"),
    ("OutOfMemory", "raise the builder's memory limit, or lower the largest size"),
    ("bad_alloc", "the machine's memory is used up: building needs about 3 times the weights"),
)


def check_profiles(
    component: str,
    inputs: Sequence[TensorSpec],
    profiles: Sequence[Mapping[str, DimensionRange]],
) -> None:
    """Raise `UsageError` where a bucket does not give every symbol of the inputs a range."""
    symbols = {d for spec in inputs for d in spec.shape if isinstance(d, str)}
    if not profiles:
        raise UsageError(f"{component}: an engine needs at least one resolution bucket.")
    for profile in profiles:
        if missing := sorted(symbols - profile.keys()):
            raise UsageError(f"{component}: a resolution bucket lacks {', '.join(missing)}.")
        for symbol, sizes in profile.items():
            if not 1 <= sizes.min <= sizes.opt <= sizes.max:
                raise UsageError(
                    f"{component}: dimension {symbol} must have 1 <= min <= opt <= max, not "
                    f"{sizes.min}, {sizes.opt}, {sizes.max}."
                )


def build_engine(
    trt: Any,
    source: EngineSource,
    targets: Sequence[str],
    settings: BuildSettings,
    timings: Path | None,
    destination: Path,
    progress: Progress,
) -> FusionReport:
    """Build `destination`; what became of the graph's products. The errors are `Runtime.build`'s.

    `timings` is a file that keeps what was measured for the next build, None for a builder that
    measures nothing. The builder works in a thread of its own, so that Ctrl-C is noticed at once;
    it stops at its next step.
    """
    # What an earlier build has left is freed now. Freed while the builder works, an object of
    # TensorRT waits for the builder's lock, and the builder for Python's, to tell its logger.
    gc.collect()
    stop = threading.Event()
    where = "+".join(targets)
    task = progress.task(f"  {source.component}: building for {where}", total=1.0)
    job = _Job(trt, source, targets, settings, timings, task, stop)
    with ThreadPoolExecutor(1, thread_name_prefix="tensorrt-build") as pool:
        future = pool.submit(job.run, destination)
        try:
            # With a limit, so that Ctrl-C gets through wherever it is delivered to.
            while not future.done():
                wait([future], timeout=0.2)
            report = future.result()
        except BaseException:
            stop.set()
            raise
    task.finish()
    return report


class _Job:
    """One build. Made in the calling thread, run in another."""

    def __init__(
        self,
        trt: Any,
        source: EngineSource,
        targets: Sequence[str],
        settings: BuildSettings,
        timings: Path | None,
        task: Task,
        stop: threading.Event,
    ) -> None:
        self.trt = trt
        self.source = source
        self.targets = targets
        self.settings = settings
        self.timings = None if timings is None else _Timings(timings)
        self.messages = _Messages(trt)
        self.monitor = _make_monitor(trt, _Phases(task, stop))
        self.stop = stop

    def run(self, destination: Path) -> FusionReport:
        try:
            return self._build(destination)
        except BaseException as error:
            # The error would keep the library's objects in its frames until they are collected as
            # garbage, in any order, and a builder that outlives its logger ends the process.
            traceback.clear_frames(error.__traceback__)
            raise

    def _build(self, destination: Path) -> FusionReport:
        trt, logger = self.trt, self.messages.logger
        try:
            builder = trt.Builder(logger)
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
            network = builder.create_network(flags)
            # The parser keeps the weights that the network refers to: it must outlive the build.
            parser = trt.OnnxParser(network, logger)
        except TypeError as error:  # the binding's own, where the library makes nothing
            raise EngineError(
                f"TensorRT makes no builder for {self.source.component}: "
                f"{self.messages.last() or 'it gives no reason'}. Look at the NVIDIA driver: "
                "`nvidia-smi` tells which it is."
            ) from error
        if not parser.parse_from_file(str(self.source.onnx)):
            raise EngineError(self._parse_error(parser))
        config = self._configure(builder, network)
        products = _products(trt, network)
        engine = builder.build_serialized_network(network, config)
        if engine is None or self.stop.is_set():
            raise self._build_error()
        if self.timings is not None:
            self.timings.save(config)
        # IStreamWriter would be given the whole file at once, as a copy: this is the buffer itself.
        view = memoryview(engine)
        with disk_errors("write", destination), replacing(destination) as file:
            for start in range(0, len(view), _CHUNK):
                file.write(view[start : start + _CHUNK])
        return read_report(self.messages.lines(), products, len(view))

    def _configure(self, builder: Any, network: Any) -> Any:
        trt, settings = self.trt, self.settings
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = self.monitor
        if _is_rtx(trt):  # plain TensorRT builds for the GPU it has
            config.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
                capability = getattr(trt.ComputeCapability, target.upper())
                if not config.set_compute_capability(capability, index):
                    raise EngineError(f"TensorRT refuses the target {target}.")
        if settings.memory_limit is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.memory_limit)
        if settings.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if self.timings is not None:
            self.timings.load(config)
        for profile in settings.profiles:
            self._add_profile(builder, config, network, profile)
        return config

    def _add_profile(
        self, builder: Any, config: Any, network: Any, sizes: Mapping[str, DimensionRange]
    ) -> None:
        profile = builder.create_optimization_profile()
        inputs = {network.get_input(i).name for i in range(network.num_inputs)}
        for spec in self.source.inputs:
            if spec.name not in inputs:
                raise EngineError(
                    f"{self.source.onnx} has no input {spec.name}; it has "
                    f"{', '.join(sorted(inputs))}."
                )
            smallest, best, largest = (
                tuple(getattr(sizes[d], which) if isinstance(d, str) else d for d in spec.shape)
                for which in ("min", "opt", "max")
            )
            try:
                profile.set_shape(spec.name, smallest, best, largest)
            except RuntimeError as error:
                raise self._bucket_error(str(error).rstrip(".")) from error
        if config.add_optimization_profile(profile) < 0:
            raise self._bucket_error("it gives no reason")

    def _bucket_error(self, otherwise: str) -> EngineError:
        return EngineError(
            f"{self.source.component}: TensorRT refuses a resolution bucket: "
            f"{self.messages.reason() or otherwise}."
        )

    def _parse_error(self, parser: Any) -> str:
        reasons = []
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            node, kind = error.node_name(), error.node_operator()
            at = f" at {kind} {node}".rstrip() if kind or node else ""
            reasons.append(f"{error.desc().strip()}{at}")
        why = "; ".join(reasons[:3]) or self.messages.reason() or "it gives no reason"
        return (
            f"TensorRT cannot read {self.source.onnx} ({self.source.component}): {why}. "
            "Export it again with `fluxdeploy export`."
        )

    def _build_error(self) -> BaseException:
        if self.stop.is_set():
            return KeyboardInterrupt()
        reason = self.messages.reason() or "it gives no reason"
        remedies = [remedy for sign, remedy in _REMEDIES if sign in reason]
        advice = f"; {remedies[0]}" if remedies else ""
        return EngineError(
            f"TensorRT could not build {self.source.component} ({self.source.precision.name}) for "
            f"{', '.join(self.targets)}: {reason}{advice}."
        )


def _is_rtx(trt: Any) -> bool:
    """TensorRT-RTX builds for any GPU, and compiles on the machine that runs it."""
    return bool(trt.__name__ == "tensorrt_rtx")


class _Timings:
    """The file of a timing cache. It only saves time: a build that cannot keep it is still one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, config: Any) -> None:
        """Give the builder what was measured before, and a place for what it will measure."""
        known = b""
        with suppress(OSError):
            known = self._path.read_bytes()
        # One of another GPU or version, or a broken one, is no use: a new one takes its place.
        for data in (known, b""):
            cache = config.create_timing_cache(data)
            if cache is not None and config.set_timing_cache(cache, False):
                return

    def save(self, config: Any) -> None:
        cache = config.get_timing_cache()
        if cache is not None:
            with suppress(OSError, BundleError):
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_atomic(self._path, bytes(cache.serialize()))


class _Messages:
    """What the builder says: errors for people, and the lines that tell of kernels."""

    _KEPT = ("Layers:", "Name: ", "Total Weights Memory", "Engine Layer Information")

    def __init__(self, trt: Any) -> None:
        errors: list[str] = []
        told: list[str] = []
        severe = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)
        kept = self._KEPT

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, msg: str) -> None:
                if severity in severe:
                    errors.append(msg)
                elif msg.startswith(kept):
                    told.append(msg)

        self.logger = Logger()
        self._errors, self._told = errors, told

    def lines(self) -> list[str]:
        return [line for message in self._told for line in message.splitlines()]

    def reason(self) -> str:
        """The last errors in one line, without those that only tell of a missing driver."""
        return _in_one_line(e for e in self._errors if not _NOISE.search(e))

    def last(self) -> str:
        """The last errors in one line, whatever they are."""
        return _in_one_line(self._errors)


def _in_one_line(errors: Iterable[str]) -> str:
    unique = list(dict.fromkeys(" ".join(e.split()) for e in errors))
    return "; ".join(unique[-2:]).rstrip(".")


class _Phases:
    """The builder's nested phases as one number from 0 to 1. Called from its threads."""

    def __init__(self, task: Task, stop: threading.Event) -> None:
        self._task, self._stop = task, stop
        self._lock = threading.Lock()
        self._steps: dict[str, tuple[str | None, int, int]] = {}
        self._shown = 0.0

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._steps[phase] = (parent, max(steps, 1), 0)

    def step(self, phase: str, step: int) -> bool:
        """A step is done; whether to go on."""
        with self._lock:
            parent, steps, _ = self._steps.get(phase, (None, 1, 0))
            self._steps[phase] = (parent, steps, min(step + 1, steps))
            self._show()
        return not self._stop.is_set()

    def finish(self, phase: str) -> None:
        with self._lock:
            self._steps.pop(phase, None)

    def _show(self) -> None:
        fraction, width, at = 0.0, 1.0, None
        for _ in range(len(self._steps)):
            # The last one that started, where several of one parent run side by side.
            inner = [name for name, (parent, _, _) in self._steps.items() if parent == at]
            if not inner:
                break
            at = inner[-1]
            _, steps, done = self._steps[at]
            width /= steps
            fraction += width * done
        # A phase may repeat within one step of its parent: the bar never goes back, and what is
        # left for the writing of the file is small.
        if (n := min(fraction, 0.99) - self._shown) >= 0.01:
            self._shown += n
            self._task.advance(n)


def _make_monitor(trt: Any, phases: _Phases) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _products(trt: Any, network: Any) -> Products:
    """The network's matrix products and softmaxes by the ONNX nodes that they come from."""
    kinds = trt.LayerType
    makers: dict[str, Any] = {}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        for index in range(layer.num_outputs):
            makers[layer.get_output(index).name] = layer
    # What stands between a weight and its product: types, scales and shapes.
    passive = (kinds.CAST, kinds.DEQUANTIZE, kinds.IDENTITY, kinds.SHUFFLE)

    def is_weight(tensor: Any) -> bool:
        layer = makers.get(tensor.name)
        while layer is not None and layer.type in passive:
            layer = makers.get(layer.get_input(0).name)
        return layer is not None and layer.type == kinds.CONSTANT

    linears: set[str] = set()
    scores: set[str] = set()
    softmaxes: set[str] = set()
    for layer in layers:
        names = _NODE.findall(layer.metadata)
        if layer.type == kinds.SOFTMAX:
            softmaxes.update(names)
        elif layer.type == kinds.CONVOLUTION:
            linears.update(names)
        elif layer.type == kinds.MATRIX_MULTIPLY:
            weighs = is_weight(layer.get_input(0)) or is_weight(layer.get_input(1))
            (linears if weighs else scores).update(names)
    return Products(frozenset(linears), frozenset(scores), frozenset(softmaxes))
