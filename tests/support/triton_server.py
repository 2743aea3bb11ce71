"""A real Triton server for the tests: `python -m tests.support.triton_server FOLDER` fetches one.

It is the one in NVIDIA's wheel nvidia-pytriton, Apache-2.0, of which nothing else is used. Its
Python backend brings a Python interpreter of its own, which runs here in an environment with the
packages of the tests and NumPy 1.26: it is older than NumPy 2, and reads that one's arrays wrongly.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TritonServer", "missing", "serve"]

ROOT = Path(__file__).resolve().parents[2]

WHEEL = "nvidia-pytriton==0.7.0"
NUMPY = "numpy==1.26.4"

_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARY = f"lib{_PYTHON}.so.1.0"
_STARTS_IN = 60.0
"""Seconds."""


def home() -> Path:
    """Where the server is, or would be."""
    return Path(os.environ.get("FLUXDEPLOY_TRITON") or Path(sys.prefix) / "triton")


def missing() -> str | None:
    """Why there is no server here, or None."""
    if (home() / ".ready").is_file():
        return None
    return _impossible() or f"no Triton server in {home()}: `make test` fetches one"


def _impossible() -> str | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "NVIDIA's wheel with a Triton server is for Linux on x86-64"
    if not (3, 8) <= sys.version_info[:2] <= (3, 12):
        return "NumPy 1.26 is for Python 3.12 at most"
    try:
        ctypes.CDLL(str((_library_folder() or Path()) / _LIBRARY))
    except OSError:
        return f"Triton's Python backend needs {_LIBRARY}, which is not on this machine"
    return None


def _library_folder() -> Path | None:
    """Where this interpreter's shared library is, if it has one of its own."""
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    return folder if (folder / _LIBRARY).is_file() else None


def fetch(folder: Path) -> None:
    """Put the server into a folder, with an environment for its Python backend."""
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, WHEEL], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("pytriton/tritonserver/", "nvidia_pytriton.libs/", "nvidia_pytriton-")
            archive.extractall(folder, [n for n in archive.namelist() if n.startswith(wanted)])
    server = folder / "pytriton" / "tritonserver"
    backend = server / "backends" / "python"
    stub = f"{sys.version_info.major}.{sys.version_info.minor}/triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / stub, backend)
    shutil.rmtree(server / "python_backend_stubs")
    for program in (server / "bin" / "tritonserver", backend / "triton_python_backend_stub"):
        program.chmod(0o755)
    # The stub looks for no PYTHONPATH, but for the environment of the first `python3` on the path.
    packages = folder / "env" / "lib" / _PYTHON / "site-packages"
    subprocess.run([*pip, "install", "--no-deps", "--target", packages, NUMPY], check=True)
    (folder / "env" / "bin").mkdir()
    (folder / "env" / "bin" / "python3").symlink_to(os.path.realpath(sys.executable))
    base = Path(sys.base_prefix) / "bin" if _library_folder() else Path("/usr/bin")
    (folder / "env" / "pyvenv.cfg").write_text(f"home = {base}\n")
    (packages / "tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (folder / ".ready").touch()


@dataclass(frozen=True)
class TritonServer:
    """A running server: HOST:PORT of its services, and where its log is."""

    http: str
    grpc: str
    metrics: str
    log: Path

    def fetch_metrics(self) -> dict[str, float]:
        """What its page for Prometheus says, by series."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        series = [line.rpartition(" ") for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in series}


@contextmanager
def serve(repository: Path, log: Path) -> Iterator[TritonServer]:
    """A server on a repository, once all its models are ready.

    Raises `AssertionError`, with the log, where it does not get ready.
    """
    server = home() / "pytriton" / "tritonserver"
    http, grpc, metrics = _free_ports()
    libraries = [home() / "nvidia_pytriton.libs", *filter(None, [_library_folder()])]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "PATH": f"{home() / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    command = [
        server / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={server / 'backends'}",
        "--disable-auto-complete-config",
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        f"--metrics-port={metrics}",
        "--allow-gpu-metrics=false",
        "--exit-timeout-secs=5",
    ]
    with log.open("w") as output:
        # The stub's path begins with the current folder: the code of this checkout.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + _STARTS_IN
        while not _is_ready(http):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield TritonServer(*(f"127.0.0.1:{port}" for port in (http, grpc, metrics)), log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2):
            return True
    except OSError:
        return False


def _free_ports() -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> None:
    """Fetch the server into the folder that the command line names, where it can run."""
    (folder,) = map(Path, sys.argv[1:])
    reason = _impossible()
    if reason is not None:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        try:
            fetch(folder)
        except subprocess.CalledProcessError:
            shutil.rmtree(folder, ignore_errors=True)  # make tries again
            reason = f"{WHEEL} or {NUMPY} could not be fetched"
    if reason is not None:
        print(f"The tests of the Triton server will be skipped: {reason}.")


if __name__ == "__main__":
    main()
