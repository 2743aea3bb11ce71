"""Many pictures on a Ray cluster whose workers are killed: nothing lost, nothing doubled.

`python benchmarks/killed_ray.py BUNDLE --json benchmarks/results/killed_ray.json`
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import ray
from killed_batch import largest_difference, make_row, tell

from tests.support.killed import lines_of, made_wrongly


def workers_below(parent: int) -> Iterator[int]:
    """The processes of Ray's workers that `parent` has begun, or what it has begun."""
    parents, workers = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
            title = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        pid = int(folder.name)
        parents[pid] = int(status.rpartition(")")[2].split()[1])
        if title.startswith(b"ray::_Worker"):
            workers.append(pid)
    for worker in workers:
        above = worker
        while above in parents and above != parent:
            above = parents[above]
        if above == parent:
            yield worker


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--prompts", "count", type=click.IntRange(min=1), default=200, help="Pictures.")
@click.option("--workers", type=click.IntRange(min=2), default=2, help="Of the cluster.")
@click.option("--kills", type=click.IntRange(min=1), default=3, help="Workers that are killed.")
@click.option("--seed", type=int, default=0, help="Of the prompts and of the moments.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Where to write figures.")
def main(
    bundle: Path, count: int, workers: int, kills: int, seed: int, report: Path | None
) -> None:
    """Run, kill workers, and compare."""
    rng = random.Random(seed)
    rows = [make_row(rng, number) for number in range(count)]
    with tempfile.TemporaryDirectory() as name:
        source, folder = Path(name, "prompts.jsonl"), Path(name, "made")
        folder.mkdir()
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        index = folder / "x.index.jsonl"
        command = [sys.executable, "-m", "fluxdeploy", "generate", "--prompts", str(source)]
        command += ["--bundle", str(bundle), "--out", str(folder / "x.png"), "--threads", "1"]
        command += ["--ray", "local", "--workers", str(workers)]
        start = time.perf_counter()
        made: list[int] = []
        with subprocess.Popen(command) as batch:
            while batch.poll() is None:
                due = len(made) < kills and lines_of(index) > count * (len(made) + 1) // (kills + 1)
                if due and (alive := list(workers_below(batch.pid))):
                    time.sleep(rng.uniform(0, 0.3))
                    made.append(lines_of(index))
                    os.kill(rng.choice(alive), signal.SIGKILL)
                    click.echo(f"killed one of {len(alive)} workers, with {made[-1]} pictures")
                time.sleep(0.05)
        seconds = time.perf_counter() - start
        wrong = made_wrongly(folder, index, count)
        if batch.returncode or len(made) < kills:
            wrong.append(f"exit code {batch.returncode}, {len(made)} workers killed")
        largest = 255 if wrong else largest_difference(bundle, folder, rows)
        result = {
            "ray": ray.__version__,
            "workers": workers,
            "prompts": count,
            "kills": kills,
            "pictures_at_each_kill": made,
            "seconds": round(seconds, 1),
            "pictures": len(list(folder.glob("*.png"))),
            "index_lines": lines_of(index),
            "wrong": wrong,
            "largest_difference_of_255": largest,
        }
    tell(result, report)


if __name__ == "__main__":
    main()
