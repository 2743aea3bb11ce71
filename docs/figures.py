"""Puts the measured figures into the pages that show them: `python docs/figures.py`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->` and is made from a script's results, so
that no figure is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

__all__ = ["BLOCKS", "Block", "fill"]

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures.md"
CPP = ROOT / "docs" / "cpp.md"
SERVING = ROOT / "docs" / "serving.md"
LORA = ROOT / "docs" / "lora.md"
RUN = ROOT / "docs" / "run.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
CHECKPOINTS = ROOT / "fluxdeploy" / "demo" / "checkpoints"
MODEL_CARD = CHECKPOINTS / "README.md"

_LAYOUTS = {"diffusers": "diffusers layout", "bfl": "BFL layout"}
_MODELS = {"fill": "Fill", "kontext": "Kontext", "controlnet": "dev and a ControlNet"}


def _export_scale(report: dict[str, Any]) -> str:
    """The report of benchmarks/export_scale.py as a Markdown table and the machine it ran on."""
    return _export_table(report, [_LAYOUTS[each["layout"]] for each in report["layouts"]])


def _export_table(report: dict[str, Any], names: Sequence[str]) -> str:
    layouts, targets = report["layouts"], report["targets"]
    rows = [
        ["", *names, "target"],
        ["---", *("---:" for _ in names), "---:"],
        [
            "time, imports included",
            *(f"{layout['seconds']:.0f} s" for layout in layouts),
            f"under {targets['seconds']:.0f} s",
        ],
        [
            "peak resident memory",
            *(_megabytes(layout["peak_bytes"]) for layout in layouts),
            f"under {_megabytes(targets['peak_bytes'])}",
        ],
        [
            "written to the disk",
            *(_megabytes(layout["written_bytes"]) for layout in layouts),
            f"under {_megabytes(targets['written_bytes'])}",
        ],
        [
            "weights, linked and not read",
            *(f"{layout['weight_bytes'] / 1e9:.1f} GB" for layout in layouts),
            "",
        ],
    ]
    return (
        f"{_table(rows)}\n"
        "Measured by [benchmarks/export_scale.py](../benchmarks/export_scale.py) on\n"
        f"{_machine(report['machine'])}.\n"
        "The weights are zeros in a sparse file: this measures the export, not a disk.\n"
    )


def _export_family(report: dict[str, Any]) -> str:
    """A report of benchmarks/export_scale.py --model."""
    return _export_table(report, [_MODELS[each["model"]] for each in report["layouts"]])


def _demo_scores(report: dict[str, Any]) -> str:
    """The report of benchmarks/demo_scores.py as a Markdown table and the machine it ran on."""
    scored = ("objects", "relation", "place")
    rows = [
        ["", "colours and shapes right", "relation right", "place right", "parameters", "training"],
        ["---", *["---:"] * 5],
    ]
    for name, scores in report["checkpoints"].items():
        guidance = "" if scores["guidance"] is None else f", guidance {scores['guidance']:g}"
        minutes = scores.get("training_minutes")
        rows.append(
            [
                f"`demo:{name}`, {scores['steps']} steps{guidance}",
                *(f"{scores[what]:.1%}" for what in scored),
                f"{scores['parameters'] / 1e6:.1f} million",
                "" if minutes is None else f"{minutes:.0f} min",
            ]
        )
        if "pytorch" in scores:
            shares = (f"{scores['pytorch'][what]:.1%}" for what in scored)
            rows.append(["the same in PyTorch", *shares, "", ""])
        targets = report["targets"][name]
        target = (f"{targets[what]:.0%}" if what in targets else "" for what in scored)
        rows.append(["target", *target, "", ""])
    sizes = "; ".join(dict.fromkeys(scores["size"] for scores in report["checkpoints"].values()))
    return (
        f"{_table(rows)}\n"
        f"Shares of {report['prompts']} prompts with combinations that training never saw.\n"
        f"Sizes: {sizes}.\n"
        "Measured by benchmarks/demo_scores.py on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _demo_training(report: dict[str, Any]) -> str:
    """The record of exporters/training as a Markdown table and what it ran on."""
    rows = [["stage", "steps", "minutes"], ["---", "---:", "---:"]]
    for name, stage in report["stages"].items():
        rows.append([name, f"{stage['steps']:,}", f"{stage['minutes']:.1f}"])
    rows.append(["together", "", f"{report['minutes']:.0f}"])
    machine = f"{report['device']}, {report['cores']} cores, PyTorch {report['torch']}"
    return f"{_table(rows)}\nOn {machine}.\n"


def _quantization_quality(report: dict[str, Any]) -> str:
    """The report of benchmarks/quantization_quality.py as a Markdown table."""
    rows = [
        ["against PyTorch float32", "PSNR", "SSIM", "noisiest layer", "colours and shapes right"],
        ["---", "---:", "---:", "---:", "---:"],
    ]
    for name, result in report["precisions"].items():
        rows.append(
            [
                f"`{name}`",
                f"{median(result['psnr']):.1f} dB (least {min(result['psnr']):.1f})",
                f"{median(result['ssim']):.3f} (least {min(result['ssim']):.3f})",
                f"{min(result['sqnr'].values()):.1f} dB",
                f"{result['objects']:.1%}",
            ]
        )
    rows.append(["PyTorch float32", "", "", "", f"{report['objects_in_pytorch']:.1%}"])
    return (
        f"{_table(rows)}\n"
        f"Medians over {report['pictures']} prompts, each with a seed of its own, with `demo:dev`, "
        f"{report['steps']} steps,\n{report['width']}x{report['height']} pixels. "
        "The noisiest layer is the one with the lowest signal-to-quantization-noise\nratio. "
        "Measured by "
        "[benchmarks/quantization_quality.py](../benchmarks/quantization_quality.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _quality_size(report: dict[str, Any]) -> str:
    """The report of benchmarks/quality_size.py as a Markdown table."""
    names = list(report["checkpoints"])
    rows = [["", *(what for name in names for what in (f"`{name}`", "PSNR"))]]
    rows.append(["---", *["---:"] * (2 * len(names))])
    for precision in report["checkpoints"][names[0]]:
        cells = []
        for name in names:
            found = report["checkpoints"][name][precision]
            cells.append(f"{found['bytes'] / 1e6:.1f} MB")
            cells.append(f"{median(found['psnr']):.1f} dB (least {min(found['psnr']):.1f})")
        rows.append([f"`{precision}`", *cells])
    return (
        f"{_table(rows)}\n"
        f"Graphs and weights of whole bundles, and medians over {report['pictures']} pictures "
        "against PyTorch float32, drawn\nwith `--runtime emulate`. Nothing is spared: what recipes "
        "keep is told\n[elsewhere](figures.md#what-recipes-keep-on-other-checkpoints). `random` is "
        "the first of those. ONNX Runtime\ncomputes in float32 for bf16, and beside what is "
        "quantized; the bundle in `fp4`, for TensorRT-RTX, is\nin bfloat16 there. "
        "Measured by [benchmarks/quality_size.py](../benchmarks/quality_size.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _recipes(report: dict[str, Any]) -> str:
    """The report of benchmarks/recipes.py as a Markdown table."""
    rows = [
        [
            "",
            "promised",
            "without a recipe",
            "with it",
            "on other prompts",
            "kept",
            "weights spared",
            "noisiest layer",
        ],
        ["---", *["---:"] * 7],
    ]
    demo = ("demo:dev", "demo:schnell")
    for precision in dict.fromkeys(row["precision"] for row in report["rows"]):
        own = [row for row in report["rows"] if row["precision"] == precision]
        odd = [row for row in own if row["checkpoint"] not in demo]
        rows.append(_recipe_row(f"`{precision}`, {len(odd)} odd checkpoints", odd))
        rows += [
            _recipe_row(f"`{precision}`, `{row['checkpoint']}`", [row])
            for row in own
            if row["checkpoint"] in demo
        ]
    later = "".join(
        f";\n`{precision}`, later, on {_machine(machine)}"
        for precision, machine in report.get("later", {}).items()
    )
    return (
        f"{_table(rows)}\n"
        "PSNR against PyTorch float32: medians over pictures, and of the ten checkpoints the "
        "median and the\nleast. The other prompts and seeds are those that the search did not see. "
        "Weights spared are of the\ntransformer: median and most; most in FP4 are linears "
        "whose widths are no multiples of 16.\nAll is computed in PyTorch, "
        "with the numbers of the graphs, by\n"
        "[benchmarks/recipes.py](../benchmarks/recipes.py) on\n"
        f"{_machine(report['machine'])}{later}.\n"
    )


def _recipe_row(name: str, rows: list[dict[str, Any]]) -> list[str]:
    def spread(key: str) -> str:
        values = [row[key] for row in rows]
        least = f" (least {min(values):.1f})" if len(values) > 1 else ""
        return f"{median(values):.1f} dB{least}"

    shares = [row["share"] for row in rows]
    most = f" (most {max(shares):.0%})" if len(shares) > 1 else ""
    layers = [row["worst_layer"] for row in rows if row["worst_layer"] is not None]
    return [
        name,
        f"{rows[0]['promised']:g} dB",
        *(spread(key) for key in ("before", "after", "held_out")),
        f"{sum(row['kept'] for row in rows)} of {len(rows)}",
        f"{median(shares):.0%}{most}",
        f"{min(layers):.1f} dB" if layers else "",
    ]


def _quantize_scale(report: dict[str, Any]) -> str:
    """The report of benchmarks/quantize_scale.py as a Markdown table."""
    rows = [["", "written", "killed after", "from there on", "", "peak of memory"]]
    rows.append(["---", *["---:"] * 5])
    for precision, found in report["precisions"].items():
        killed, whole = found["killed"], found["resumed"]
        assert whole["resumed"] >= killed["files"]
        rows.append(
            [
                f"`{precision}`",
                f"{found['bytes'] / 1e9:.1f} GB in {whole['files']} files",
                f"{killed['files']} files, {killed['seconds']:.0f} s",
                f"{whole['seconds']:.0f} s",
                f"{whole['rate'] / 1e6:.0f} MB/s",
                _megabytes(whole["peak_bytes"]),
            ]
        )
    calibrations = [found.get("calibration_bytes") for found in report["precisions"].values()]
    given = (
        f"A `calibration.json` of {max(calibrations) / 1e6:.1f} MB is given.\n"
        if all(calibrations)
        # Of before the benchmark gave one.
        else "Without means and moments of inputs.\n"
    )
    return (
        f"{_table(rows)}\n"
        f"A transformer and a conditioner at full size. {given}"
        "Killed, a second run takes over what was whole. Seconds are of whole processes, the rate "
        "is of\nbytes that are written, hashing included. "
        "Measured by [benchmarks/quantize_scale.py](../benchmarks/quantize_scale.py) on\n"
        f"{_machine(report['machine'])}.\nThe weights are zeros that need no reading from a disk.\n"
    )


def _latency(report: dict[str, Any]) -> str:
    """The report of benchmarks/latency.py as Markdown tables, one for each kind of model."""
    demo = f"{_demo(report['demo'])}\n" if "demo" in report else ""
    machine = next(iter(report.values()))["machine"]
    return (
        f"{demo}{_width(report)}"
        "Measured by [benchmarks/latency.py](../benchmarks/latency.py) on\n"
        f"{_machine(machine)}, ONNX Runtime {machine['packages']['onnxruntime']}, "
        f"OpenVINO {machine['packages']['openvino']}.\n"
    )


def _demo(demo: dict[str, Any]) -> str:
    load, noise = demo["workload"], demo["noise"]
    quantities = ("step", "picture", "cold start")
    rows = [
        ["`demo:dev`", "a step", "a picture", "start to saved picture", "memory"],
        ["---", *["---:"] * 4],
    ]
    for each in demo["contenders"]:
        found = (each["timings"][quantity]["ratio"] for quantity in quantities)
        memory = _megabytes(each["memory"])
        rows.append([_NAMES.get(each["name"], each["name"]), *map(_times, found), memory])
    return (
        f"{_table(rows)}\n"
        "Times faster than PyTorch eager fp32 (diffusers): "
        f"{load['width']}x{load['height']} pixels, {load['steps']} steps, "
        f"{load['threads']} threads. Medians of {demo['rounds']} rounds with their middle 80%. "
        "Eager fp32 against itself: "
        f"{_times(noise['step'])} a step, {_times(noise['picture'])} a picture.\n"
    )


def _width(report: dict[str, Any]) -> str:
    """FLUX.1's width: a column for each size and each of the two baselines."""
    sizes = [value for name, value in report.items() if name.startswith("width-")]
    loads = [size["workload"] for size in sizes]
    baselines = {"eager": "fp32", "eager-bf16": "bf16"}
    headings = [
        f"{load['width']}x{load['height']}, eager {precision} = 1"
        for load in loads
        for precision in baselines.values()
    ]
    rows = [["FLUX.1's width", *headings], ["---", *["---:"] * len(headings)]]
    rounds = [{e["name"]: e["timings"]["step"]["rounds"] for e in s["contenders"]} for s in sizes]
    for name in dict.fromkeys(name for own in rounds for name in own):
        cells = [
            _times(_ratio(own[peer], own[name])) if name in own else ""
            for own in rounds
            for peer in baselines
        ]
        rows.append([_NAMES.get(name, name), *cells])
    tokens = " and ".join(f"{load['width'] * load['height'] // 256:,}" for load in loads)
    counts = " and ".join(str(size["rounds"]) for size in sizes)
    noise = " and ".join(_times(size["noise"]["step"]) for size in sizes)
    return (
        f"{_table(rows)}\n"
        f"A step with {sizes[0]['double_blocks']} double and {sizes[0]['single_blocks']} single "
        f"blocks, {tokens} image and {loads[0]['tokens']} text tokens, random weights,\n"
        f"{loads[0]['threads']} threads. Medians of {counts} rounds with their middle "
        f"80%. Eager against itself: {noise}.\n"
    )


_GPU_NAMES = {
    "onnxruntime, bf16": "ours on ONNX Runtime, bf16",
    "onnxruntime, fp16": "ours on ONNX Runtime, fp16",
    "onnxruntime, fp8-weights": "ours on ONNX Runtime, fp8-weights",
    "eager-bf16": "PyTorch eager bf16",
    "compile-bf16": "torch.compile bf16",
}


def _gpu_latency(report: dict[str, Any]) -> str:
    """The report of benchmarks/gpu_latency.py: a pair of columns for each size."""
    sizes = list(report["sizes"].values())
    reports = [size["report"] for size in sizes]
    loads = [each["workload"] for each in reports]
    headings = [f"{load['width']}x{load['height']}" for load in loads]
    rows = [
        ["", *(f"{size}{what}" for size in headings for what in ("", ", of the roofline"))],
        ["---", *["---:"] * 2 * len(sizes)],
    ]
    for row in zip(*(each["contenders"] for each in reports), strict=True):
        cells = []
        for size, each in zip(sizes, row, strict=True):
            share = size["share_of_roofline"].get(each["name"])
            cells.append(_times(each["timings"]["step"]["ratio"]))
            cells.append("" if share is None else f"{share:.0%}")
        rows.append([_GPU_NAMES.get(row[0]["name"], row[0]["name"]), *cells])
    base = [next(c for c in r["contenders"] if c["name"] == r["baseline"]) for r in reports]
    steps = " and ".join(f"{1e3 * each['timings']['step']['p50']:.1f}" for each in base)
    noise = " and ".join(_times(each["noise"]["step"]) for each in reports)
    hosts = " and ".join(
        f"{1e3 * r['contenders'][0]['timings']['host']['p50']:.2f}" for r in reports
    )
    machine, packages = reports[0]["machine"], reports[0]["machine"]["packages"]
    return (
        f"{_table(rows)}\n"
        "Times faster than PyTorch eager bf16 (diffusers), a step of FLUX.1's width with "
        f"{report['double_blocks']} double and {report['single_blocks']}\nsingle blocks, random "
        f"weights, one picture. Eager's step takes {steps} ms. Medians of {reports[0]['rounds']} "
        f"rounds with\ntheir middle 80%; eager against itself: {noise}.\nOur host's own work in a "
        f"step takes {hosts} ms. "
        "Measured by\n[benchmarks/gpu_latency.py](../benchmarks/gpu_latency.py) on "
        f"{machine['gpu']}, {machine['cores']} cores, Python {machine['python']},\n"
        f"PyTorch {packages['torch']}, ONNX Runtime {packages['onnxruntime']}.\n"
    )


_GPU_STEP_NAMES = {
    "native, fp8": "ours, `native` in fp8",
    "native, bf16": "ours, `native` in bf16",
    "compile-blocks-cudnn": "torch.compile bf16, cuDNN attention",
    "eager": "PyTorch eager bf16",
}


def _gpu_step(report: dict[str, Any]) -> str:
    """The report of benchmarks/gpu_step.py: a row for each contender, at both sizes."""
    timed = [found for found in report["results"] if "step_ms" in found]
    by_name = {(found["what"], found["size"]): found for found in timed}
    names = [name for name in _GPU_STEP_NAMES if (name, 1024) in by_name]
    rows = [
        ["a step", "1024x1024", "512x512", "Tflop/s", "joules", "GPU memory"],
        ["---", *["---:"] * 5],
    ]
    for name in names:
        large, small = by_name[name, 1024], by_name.get((name, 512))
        rows.append(
            [
                _GPU_STEP_NAMES[name],
                f"{large['step_ms']:.1f} ms",
                "" if small is None else f"{small['step_ms']:.1f} ms" + _EARLIER * _is_old(small),
                f"{_STEP_TFLOP / large['step_ms'] * 1e3:,.0f}",
                f"{large['joules']:.0f}",
                f"{large['memory'] / 1e9:.1f} GB",
            ]
        )
    ours = [name for name in names if name.startswith("native")]
    ratios = [
        [
            by_name[peer, size]["step_ms"] / by_name[name, size]["step_ms"]
            for peer, size in (("compile-blocks-cudnn", 1024), ("compile-blocks-cudnn", 512))
        ]
        + [by_name["eager", 1024]["step_ms"] / by_name[name, 1024]["step_ms"]]
        for name in ours
    ]
    machine, packages = report["machine"], report["machine"]["packages"]
    compiled = ", ".join(
        f"in {name.split()[-1]} {large:.2f} and {small:.2f} times"
        for name, (large, small, _) in zip(ours, ratios, strict=True)
    )
    eagers = " and ".join(f"{eager:.2f}" for *_, eager in ratios)
    watts = float(machine["idle"]["power.limit"].split()[0])
    return (
        f"{_table(rows)}\n"
        f"FLUX.1-dev's transformer at full depth, {report['double_blocks']} double and "
        f"{report['single_blocks']} single blocks, random weights,\n"
        "one picture and 512 text tokens: medians as a host sees them, one contender at a time. "
        "Tflop/s,\njoules and memory are at "
        "1024x1024, memory is all that the process has on the GPU. Ours is\nas fast as "
        f"torch.compile of the blocks {compiled},\nand as fast as eager {eagers} times. The star: "
        "of an earlier run, on another GPU of the same kind.\n"
        "Measured by [benchmarks/gpu_step.py](../benchmarks/gpu_step.py) on one\n"
        f"{machine['gpu']} of {watts:.0f} W, Python {machine['python']}, "
        f"PyTorch {packages['torch']}, cuDNN 9.19,\nkernels compiled with Triton "
        f"{packages['triton']}.\n"
    )


_EARLIER = " *"


def _is_old(found: dict[str, Any]) -> bool:
    """Whether it is of an earlier run than the others of its report."""
    return bool(found.get("earlier"))


_STEP_TFLOP = 59.49 + 14.87
"""Products and attention of a step at 1024x1024, as `benchmarks/roofline.py` counts them."""


def _gpu_step_kernels(report: dict[str, Any]) -> str:
    """Where the time of a step goes, kernel by kernel."""
    found = {
        found["what"].split(", ")[1].split(":")[0]: found["kernels"]
        for found in report["results"]
        if "kernels" in found and found["size"] == 1024
    }
    groups = {"products": 0.0, "attention": 0.0, "norm": 0.0, "rope": 0.0, "the rest": 0.0}
    names = {"norm": "AdaLN", "rope": "QK norm and RoPE by themselves"}
    rows = [["ms of a step at 1024x1024", *found], ["---", *["---:"] * len(found)]]
    sums = {precision: dict(groups) for precision in found}
    for precision, kernels in found.items():
        for label, each in kernels.items():
            group = label if label in groups else "the rest"
            if label.startswith("linear 4608"):
                group = "products"
            sums[precision][group] += each["ms"]
    for group in groups:
        rows.append([names.get(group, group), *(f"{sums[p][group]:.1f}" for p in found)])
    return f"{_table(rows)}\n"


def _cpu_runtimes(report: dict[str, Any]) -> str:
    """A step in each CPU runtime, beside PyTorch."""
    names = {
        "openvino-int8": "OpenVINO int8",
        "onnxruntime-int8": "ONNX Runtime int8",
        "eager-bf16": "PyTorch eager bf16",
        "openvino-bf16": "OpenVINO bf16",
        "openvino-fp32": "OpenVINO fp32",
        "onnxruntime-fp32": "ONNX Runtime fp32",
        "eager": "PyTorch eager fp32",
    }
    steps = {
        name: median(s for turn in turns for s in turn["seconds"])
        for name, turns in report["turns"].items()
    }
    rows = [
        ["a step", "seconds", "over eager bf16", "over OpenVINO bf16"],
        ["---", *["---:"] * 3],
    ]
    for name, words in names.items():
        ratios = (steps[peer] / steps[name] for peer in ("eager-bf16", "openvino-bf16"))
        rows.append([words, f"{steps[name]:.2f}", *(f"{ratio:.2f}x" for ratio in ratios)])
    turns = len(report["turns"]["eager"])
    least = min(turn["cores"] for turns in report["turns"].values() for turn in turns)
    double, single = report["blocks"]
    return (
        f"{_table(rows)}\n"
        f"FLUX.1's width with {double} double and {single} single blocks, random weights, "
        f"{report['size']}x{report['size']} and {report['tokens']} text\n"
        f"tokens. Medians of {turns} turns of 3 steps, one contender at a time in a process of its "
        f"own, which had\nat least {least:.2f} of {report['threads']} cores. Measured by "
        "[benchmarks/cpu_runtimes.py](../benchmarks/cpu_runtimes.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _gpu_profile(report: dict[str, Any]) -> str:
    """What NVIDIA's profiler says of the kernels of benchmarks/gpu_profile.py."""
    rows = [
        ["of its peak", "microseconds", "multiprocessors", "L2 cache", "issue slots"],
        ["---", *["---:"] * 4],
    ]
    for found in report["kernels"]:
        shares = (f"{found[name]:.0f}%" for name in ("multiprocessors", "l2", "issued"))
        rows.append([found["kernel"], f"{found['microseconds']:.0f}", *shares])
    return (
        f"{_table(rows)}\n"
        "Each alone and once, at the clocks that an idle GPU begins with: rows x channels in x "
        "channels\nout, what follows, and the tile. Measured by "
        "[benchmarks/gpu_profile.py](../benchmarks/gpu_profile.py)\n"
        f"under Nsight Compute on one {report['gpu']}.\n"
    )


_ORT_CUDA_NAMES = {
    "eager": "PyTorch eager",
    "casts": "ONNX Runtime, float32 between operators",
    "narrow": "ONNX Runtime, a bundle's graph",
}


def _ort_cuda_step(report: dict[str, Any]) -> str:
    """The report of benchmarks/ort_cuda_step.py: a row for each contender, at both sizes."""
    timed = [found for found in report["results"] if "step_ms" in found]
    found = {(each["what"], each["size"]): each for each in timed}
    rows = [
        ["a step in bf16", "1024x1024", "512x512", "as a CUDA graph", "joules", "off eager by"],
        ["---", *["---:"] * 5],
    ]
    for name, shown in _ORT_CUDA_NAMES.items():
        large, small = found[name, 1024], found[name, 512]
        graph = found.get((f"{name}, CUDA graph", 512))
        rows.append(
            [
                shown,
                f"{large['step_ms']:.1f} ms",
                f"{small['step_ms']:.1f} ms",
                "" if graph is None else f"{graph['step_ms']:.1f} ms",
                f"{large['joules']:.1f}",
                f"{large['error']:.2%}" if large["error"] else "",
            ]
        )
    casts, eagers = (
        [found[name, s]["step_ms"] / found["narrow", s]["step_ms"] for s in (1024, 512)]
        for name in ("casts", "eager")
    )
    less = [
        1 - found[f"{name}, CUDA graph", 512]["step_ms"] / found[name, 512]["step_ms"]
        for name in ("narrow", "casts")
    ]
    eager, machine = found["eager", 512], report["machine"]
    (attention,) = {kernel for each in timed for kernel in each.get("attention", ())}
    packages, cudnn = machine["packages"], machine["cudnn"]
    return (
        f"{_table(rows)}\n"
        f"FLUX.1-dev's transformer with {report['double_blocks']} double and "
        f"{report['single_blocks']} single blocks of full width, random weights, one\npicture and "
        "512 text tokens: medians of one run, one contender at a time. A bundle's graph is\n"
        f"{casts[0]:.2f} and {casts[1]:.2f} times as fast as the one with float32, and "
        f"{eagers[0]:.2f} and {eagers[1]:.2f} times as fast as eager,\nwhose steps at 512x512 vary "
        f"from {eager['p10_ms']:.1f} to {eager['p90_ms']:.1f} ms. All launches as one CUDA graph, "
        f"at\n512x512, take {less[0]:.0%} less time, and {less[1]:.0%} with "
        "float32: that was measured and is not built in. Joules\nand distances are at 1024x1024. "
        "The GPU's power limit held the clocks at times, in every row.\nONNX Runtime's kernel of "
        f"attention was {attention} in both graphs. Measured by\n"
        "[benchmarks/ort_cuda_step.py](../benchmarks/ort_cuda_step.py) on one "
        f"{machine['gpu']}, driver\n{machine['driver_version']}, PyTorch {packages['torch']}, "
        f"ONNX Runtime {packages['onnxruntime-gpu']}, cuDNN "
        f"{cudnn // 10000}.{cudnn // 100 % 100}.\n"
    )


def _gpu_kernels(report: dict[str, Any]) -> str:
    """The products of FLUX.1's blocks at 1024x1024: ours with what follows them, and cuBLAS's."""
    best: dict[tuple[str, str, str], float] = {}
    for found in report["results"]:
        if "milliseconds" not in found or not found.get("shape", "").startswith("4608x"):
            continue
        kind = "fp8" if "fp8" in found["what"] else "bf16"
        if found["stage"] in ("linears", "specialized") and "RoPE" not in found["what"]:
            key = ("ours", kind, found["shape"])
        elif found["stage"] == "products" and "cuDNN" not in found["what"]:
            key = ("cuBLAS", kind, found["shape"])
        else:
            continue
        rate = found["operations"] / found["milliseconds"] / 1e9
        best[key] = max(best.get(key, 0.0), rate)
    shapes = list(dict.fromkeys(shape for _, _, shape in best))
    headings = [(kind, whose) for kind in ("bf16", "fp8") for whose in ("ours", "cuBLAS")]
    rows = [
        ["Tflop/s", *(f"{kind}, {whose}" for kind, whose in headings)],
        ["---", *["---:"] * len(headings)],
    ]
    for shape in shapes:
        rates = [f"{best[whose, kind, shape]:,.0f}" for kind, whose in headings]
        rows.append([shape.replace("x", " x "), *rates])
    attention = {
        found["what"]: found["operations"] / found["milliseconds"] / 1e9
        for found in report["results"]
        if found["stage"] == "attention" and found["shape"] == "4608 tokens"
    }
    peaks = {
        found["what"]: found["operations"] / found["milliseconds"] / 1e9
        for found in report["results"]
        if found["stage"] == "peaks" and found["what"] != "copy"
    }
    load = report["under_load"]
    watts = float(load["power.draw"].split()[0])
    return (
        f"{_table(rows)}\n"
        "Rows x channels in x channels out. Ours with bias, GELU or gate and residual, and with the"
        " rounding\nto the next product's type; cuBLAS's with bias alone, to bfloat16, and in fp8 "
        "of an earlier run. "
        "A product of "
        f"8192³ has {peaks['bf16']:,.0f} and\n{peaks['fp8']:,.0f}. Attention over 4,608 tokens, by "
        f"cuDNN: {attention['native, bf16']:,.0f} and {attention['native, fp8']:,.0f}; PyTorch's "
        f"FlashAttention 2 in bf16:\n{attention['torch, FlashAttention']:,.0f}. Measured by "
        "[benchmarks/gpu_kernels.py](../benchmarks/gpu_kernels.py) on one\n"
        f"{report['machine']['gpu']}, whose clocks fall to {load['clocks.sm']} under that load, at "
        f"{watts:.0f} W.\n"
    )


def _host_step(report: dict[str, Any]) -> str:
    """The report of benchmarks/host_step.py as a Markdown table."""
    own, bare = report["microseconds"]["arithmetic"], {}
    rows = [["in a step", "microseconds"], ["---", "---:"]]
    rows += [[f"NumPy: {name}", f"{value:.0f}"] for name, value in own.items()]
    for runtime, parts in report["microseconds"].items():
        if runtime == "arithmetic":
            continue
        name, call = _RUNTIMES[runtime], parts["the call alone"]
        bare[name] = parts["a step"] - call
        rows.append([f"{name}: checks and binding", f"{parts['binding and call'] - call:.0f}"])
        rows.append([f"{name}: all of the host's work", f"{bare[name]:.0f}"])
    return (
        f"{_table(rows)}\n"
        f"{report['size']}x{report['size']} pixels, {report['steps']} steps, medians of "
        f"{report['rounds']} runs. Measured by\n"
        "[benchmarks/host_step.py](../benchmarks/host_step.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _lora_step(report: dict[str, Any]) -> str:
    """The report of benchmarks/lora_step.py as a Markdown table."""
    names = list(report["sizes"][0]["milliseconds"])
    rows = [["milliseconds of a step", *names], ["---", *("---:" for _ in names)]]
    for row in report["sizes"]:
        taken = row["milliseconds"]
        cells = [f"{taken[name]:.1f} ({taken[name] / taken[names[0]]:.2f}x)" for name in names]
        rows.append([f"{row['size']}x{row['size']}", *cells])
    return (
        f"{_table(rows)}\n"
        f"`demo:dev` in {report['precision']} on {_RUNTIMES[report['runtime']]}, side paths of "
        f"rank {report['rank']}, medians of {report['rounds']} runs in turns.\nMeasured by "
        "[benchmarks/lora_step.py](../benchmarks/lora_step.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _conditioner_split(report: dict[str, Any]) -> str:
    """The report of benchmarks/conditioner_split.py as a Markdown table."""
    seconds, memory = report["seconds"], report["process_bytes"]
    ratio = _ratio(seconds["one piece"], seconds["transformer"])
    rows = [["", "seconds", "memory of the process"], ["---", "---:", "---:"]]
    for name, label in (
        ("one piece", "a step in one piece"),
        ("transformer", "a step, split"),
        ("conditioner, all steps", f"the conditioner, once for {report['steps']} steps"),
    ):
        size = memory[name.partition(",")[0]]
        rows.append([label, f"{median(seconds[name]):.3f}", _megabytes(size)])
    return (
        f"{_table(rows)}\n"
        f"A step is {_times(ratio)} times as fast split. FLUX.1's width with "
        f"{report['double_blocks']} double and {report['single_blocks']} single blocks,\n"
        f"{report['image_tokens']:,} image and {report['text_tokens']} text tokens, float32 on "
        "ONNX Runtime, random weights. The conditioner's\nprocess ends before the first step in "
        "a pipeline with little memory. Measured by\n"
        "[benchmarks/conditioner_split.py](../benchmarks/conditioner_split.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _cost_curves(report: dict[str, Any]) -> str:
    """What benchmarks/cost_curves.py measured, at the ends of each curve."""
    quantities = {"size": "step", "batch": "step", "depth": "step", "steps": "picture"}
    words = {"size": "image tokens", "batch": "pictures", "depth": "blocks", "steps": "steps"}
    rows = [["", "from", "to", "times the work", "times the time, fp32"]]
    rows.append(["---", *["---:"] * 4])
    for axis, quantity in quantities.items():
        points = [p for p in report["curves"][axis] if p["bundle"] == "fp32"]
        first, last = points[0], points[-1]
        growth = last["seconds"][quantity] / first["seconds"][quantity]
        work = last["at"] / first["at"]
        ends = [f"{point['at']:,}" for point in (first, last)]
        rows.append([f"{words[axis]}: a {quantity}", *ends, f"{work:.0f}", f"{growth:.1f}"])
    return (
        f"{_table(rows)}\n"
        "`demo:dev`, and for the depth a network of four heads of 128 with random weights, on ONNX "
        "Runtime.\nMeasured by [benchmarks/cost_curves.py](../benchmarks/cost_curves.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


_RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}

_NAMES = {
    "eager": "PyTorch eager fp32",
    "eager-bf16": "PyTorch eager bf16",
    "compile": "torch.compile fp32",
    "compile-bf16": "torch.compile bf16",
    "openvino": "OpenVINO's conversion fp32",
    "openvino-bf16": "OpenVINO's conversion bf16",
}


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster, round by round: the median and the middle 80%."""
    low, median, high = np.quantile(np.divide(slow, fast), (0.1, 0.5, 0.9))
    return {"median": float(median), "low": float(low), "high": float(high)}


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "".join("".join(f"| {cell} " if cell else "| " for cell in row) + "|\n" for row in rows)


def _machine(machine: dict[str, Any]) -> str:
    memory = machine["memory_bytes"] / 2**30
    unit = " with AMX" if "amx_bf16" in machine.get("instruction_sets", ()) else ""
    return (
        f"{machine['cpu']}{unit}, {machine['cores']} cores, {memory:.0f} GiB,\n"
        f"{machine['system']}, Python {machine['python']}, {_packages(machine['packages'])}"
    )


def _packages(packages: Mapping[str, str]) -> str:
    """PyTorch, where it took part; else what ran the pictures."""
    name = "torch" if "torch" in packages else "onnxruntime"
    return f"{'PyTorch' if name == 'torch' else 'ONNX Runtime'} {packages[name]}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


@dataclass(frozen=True)
class Block:
    """A table, the results it is made from, and the pages that show it."""

    results: Path
    pages: tuple[Path, ...]
    render: Callable[[dict[str, Any]], str]


def _tile_quality(report: dict[str, Any]) -> str:
    """The report of benchmarks/tile_quality.py as a Markdown table."""
    rows = [["pixels", "decoded in tiles, against the whole", "encoded in tiles, decoded whole"]]
    rows.append(["---", "---:", "---:"])
    for row in report["rows"]:
        rows.append([row["pixels"], f"{row['decoded_db']} dB", f"{row['encoded_db']} dB"])
    return f"{_table(rows)}\n"


_WAYS = {
    "whole": "whole",
    "tiles": "in tiles",
    "diffusers": "diffusers, whole",
    "diffusers in tiles": "diffusers, in tiles",
}


def _large_pictures(report: dict[str, Any]) -> str:
    """The report of benchmarks/large_pictures.py as a Markdown table and the machine it ran on."""
    rows = [["decoding", "pixels", "time", "memory besides the weights"]]
    rows.append(["---", "---:", "---:", "---:"])
    for row in report["rows"]:
        pixels = f"{row['size']}x{row['size']}"
        measured = (
            [row["failed"], ""]
            if "failed" in row
            else [f"{row['seconds']:.0f} s", f"{row['run_bytes'] / 1e9:.1f} GB"]
        )
        rows.append([_WAYS[row["way"]], pixels, *measured])
    return (
        f"{_table(rows)}\n"
        "A decoder of FLUX.1's size with random weights, measured by\n"
        "[benchmarks/large_pictures.py](../benchmarks/large_pictures.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _serving(report: dict[str, Any]) -> str:
    """The report of benchmarks/soak.py as Markdown tables and the machine it ran on."""
    overhead, prompts, previews, cancel, soak = (
        report[name] for name in ("overhead", "prompts", "previews", "cancel", "soak")
    )
    kinds = soak["kinds"]
    rows = [
        ["what", "measured"],
        ["---", "---:"],
        ["a request, beyond the pipeline's own call", f"{overhead['added_ms']:.1f} ms"],
        [
            "throughput of 8 clients, against 8 threads on the pipeline",
            f"{100 / overhead['throughput_ratio']:.1f}%",
        ],
        [
            "encoding a prompt, new and known",
            f"{prompts['fresh_ms']:.1f} ms, {prompts['repeated_ms']:.1f} ms",
        ],
        ["the first of three previews, of the picture's time", f"{previews['first_share']:.0%}"],
        ["three previews cost", f"{previews['cost']:.0%}"],
        [
            "from leaving to free engines, median and 95%; a step",
            f"{cancel['free_p50_ms']:.0f} ms, {cancel['free_p95_ms']:.0f} ms; "
            f"{cancel['step_ms']:.0f} ms",
        ],
        [
            "a picture of high priority, 95%: alone, beside a large batch",
            f"{soak['high_alone_p95']:.2f} s, {soak['high_beside_batch_p95']:.2f} s",
        ],
        [
            f"soak: {soak['requests']:,} requests in {soak['seconds']:.0f} s",
            f"{kinds['drawn']:,} right pictures, {kinds['left']} left, {kinds['refused']} refused, "
            f"{kinds['lost']} lost, {kinds['mixed up']} mixed up",
        ],
        ["memory of the server after the first fifth", f"{soak['memory_growth']:+.1%}"],
    ]
    batches = [
        ["pixels", "a picture, one at a time", "a picture of four at once"],
        ["---", "---:", "---:"],
        *(
            [f"{row['side']}x{row['side']}", f"{row['one_ms']:.0f} ms", f"{row['four_ms']:.0f} ms"]
            for row in report["batches"]
        ),
    ]
    return (
        f"{_table(rows)}\n{_table(batches)}\n"
        "The default bundle, measured by [benchmarks/soak.py](../benchmarks/soak.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _cpp_host(report: dict[str, Any]) -> str:
    """The report of benchmarks/cpp_host.py as a Markdown table."""
    ours, python = report["cpp"], report["python"]
    rows = [
        ["", "C++", "Python"],
        ["---", "---:", "---:"],
        [
            "from the start of the process to a picture",
            *(f"{host['start_to_picture_s']:.2f} s" for host in (ours, python)),
        ],
        ["a step", *(f"{host['step_ms']:.1f} ms" for host in (ours, python))],
        ["peak of memory", *(f"{host['peak_mib']:.0f} MiB" for host in (ours, python))],
        ["the library", f"{report['library_bytes'] / 1e6:.1f} MB", ""],
    ]
    return (
        f"{_table(rows)}\n"
        "The default bundle, medians of "
        f"{report['rounds']} rounds in turns, measured by\n"
        "[benchmarks/cpp_host.py](../benchmarks/cpp_host.py) on\n"
        f"{report['processor']}, {report['cores']} cores.\n"
    )


def _samplers(report: dict[str, Any]) -> str:
    """The report of benchmarks/samplers.py as Markdown tables."""
    steps = list(dict.fromkeys(row["steps"] for row in report["samplers"]))
    found: dict[str, list[str]] = {}
    for row in report["samplers"]:
        cell = f"{row['median']:.1f} dB in {row['evaluations']}"
        found.setdefault(f"`{row['sampler']}`", []).append(cell)
    rows = [["median of the pictures, in evaluations", *(f"{count} steps" for count in steps)]]
    rows += [["---", *("---:" for _ in steps)], *([name, *cells] for name, cells in found.items())]
    skips = [["worst picture", "evaluations", "against all steps"], ["---", "---:", "---:"]]
    for row in report["tuned"]:
        what = f"`tune`, {row['wanted']:g} dB asked"
        skips.append([what, str(row["evaluations"]), f"{row['least']:.1f} dB"])
    for row in report["fewer_steps"]:
        skips.append(["fewer steps", str(row["evaluations"]), f"{row['least']:.1f} dB"])
    sampler, most = report["exact"]
    return (
        f"{_table(rows)}\n"
        f"Against {most} steps of `{sampler}`. Skipped steps, and fewer of them:\n\n"
        f"{_table(skips)}\n"
        f"`demo:dev`, {report['pictures']} pictures of held-out scenes; `tune` searches on one "
        "half and is held\nto the other. Measured by "
        "[benchmarks/samplers.py](../benchmarks/samplers.py) on\n"
        f"{_machine(report['machine'])}.\n"
    )


def _previews(report: dict[str, Any]) -> str:
    """The report of benchmarks/previews.py as a Markdown table and the machine it ran on."""
    step, halfway, last = (
        report[name] for name in ("step_ms", "psnr_halfway", "psnr_of_the_last_step")
    )
    rows = [
        ["previews", "a step", "after half the steps, median and least", "after the last"],
        ["---", "---:", "---:", "---:"],
        ["none", f"{step['plain']:.0f} ms", "", ""],
        [
            "linear",
            f"{step['linear']:.0f} ms",
            *(f"{found['median']} dB, {found['least']} dB" for found in (halfway, last)),
        ],
        ["of the VAE", f"{step['vae']:.0f} ms", "", ""],
    ]
    alone = ", ".join(
        f"{found:g} ms for {side}x{side}" for side, found in report["linear_map_ms"].items()
    )
    return (
        f"{_table(rows)}\n"
        f"`{report['bundle']}` at 128x128 in {report['steps']} steps: times of the fastest of "
        f"{report['rounds']} pictures, and\nPSNR of {report['pictures']} linear previews against "
        f"the decoded picture in an eighth of its size. The map\nalone takes {alone}. Measured by\n"
        "[benchmarks/previews.py](../benchmarks/previews.py) on\n"
        f"{report['processor']}, {report['cores']} cores.\n"
    )


BLOCKS: Mapping[str, Block] = {
    "export_scale": Block(RESULTS / "export_scale.json", (FIGURES,), _export_scale),
    "export_family": Block(RESULTS / "export_family.json", (FIGURES,), _export_family),
    "demo_scores": Block(RESULTS / "demo_scores.json", (FIGURES, MODEL_CARD), _demo_scores),
    "demo_training": Block(CHECKPOINTS / "training.json", (MODEL_CARD,), _demo_training),
    "quantization_quality": Block(
        RESULTS / "quantization_quality.json", (FIGURES,), _quantization_quality
    ),
    "recipes": Block(RESULTS / "recipes.json", (FIGURES,), _recipes),
    "quantize_scale": Block(RESULTS / "quantize_scale.json", (FIGURES,), _quantize_scale),
    "latency": Block(RESULTS / "latency.json", (FIGURES,), _latency),
    "gpu_latency": Block(RESULTS / "gpu_latency.json", (FIGURES,), _gpu_latency),
    "gpu_step": Block(RESULTS / "gpu_step.json", (FIGURES,), _gpu_step),
    "gpu_step_kernels": Block(RESULTS / "gpu_step.json", (PERFORMANCE,), _gpu_step_kernels),
    "cpu_runtimes": Block(RESULTS / "cpu_runtimes.json", (PERFORMANCE,), _cpu_runtimes),
    "gpu_profile": Block(RESULTS / "gpu_profile.json", (PERFORMANCE,), _gpu_profile),
    "gpu_kernels": Block(RESULTS / "gpu_kernels.json", (PERFORMANCE,), _gpu_kernels),
    "ort_cuda_step": Block(RESULTS / "ort_cuda_step.json", (PERFORMANCE,), _ort_cuda_step),
    "lora_step": Block(RESULTS / "lora_step.json", (LORA,), _lora_step),
    "host_step": Block(RESULTS / "host_step.json", (PERFORMANCE,), _host_step),
    "conditioner_split": Block(
        RESULTS / "conditioner_split.json", (PERFORMANCE,), _conditioner_split
    ),
    "cpp_host": Block(RESULTS / "cpp_host.json", (CPP,), _cpp_host),
    "samplers": Block(RESULTS / "samplers.json", (RUN,), _samplers),
    "tile_quality": Block(RESULTS / "tile_quality.json", (RUN,), _tile_quality),
    "large_pictures": Block(RESULTS / "large_pictures.json", (RUN,), _large_pictures),
    "previews": Block(RESULTS / "previews.json", (RUN,), _previews),
    "serving": Block(RESULTS / "soak.json", (SERVING,), _serving),
    "quality_size": Block(RESULTS / "quality_size.json", (PERFORMANCE,), _quality_size),
    "cost_curves": Block(RESULTS / "cost_curves.json", (PERFORMANCE,), _cost_curves),
}


def fill(page: str, name: str, text: str) -> str:
    """`page` with what stands between the marks of a block replaced by `text`.

    Raises `ValueError` where the page does not have the marks exactly once.
    """
    block = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
    filled, count = block.subn(lambda _: text, page)
    if count != 1:
        raise ValueError(f"the page has {count} blocks marked {name}; it must have one")
    return filled


if __name__ == "__main__":
    for name, block in BLOCKS.items():
        table = block.render(json.loads(block.results.read_text(encoding="utf-8")))
        for path in block.pages:
            path.write_text(fill(path.read_text(encoding="utf-8"), name, table), encoding="utf-8")
