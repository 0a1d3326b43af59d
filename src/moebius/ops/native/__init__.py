"""Kernels for the CPU in C++, compiled once on the machine they run on.

An op that has one keeps it beside its naive twin, as `native.cpp`; all are plain C functions over
raw memory, and share the headers here. They need Linux, a CPU with AVX512-BF16 (AMX is used where
there is one), and a C++ compiler; without, `missing` says what lacks and the ops take their torch
path.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")
COMPILERS = ("g++", "clang++", "c++")


@functools.cache
def missing() -> str | None:
    """What the kernels lack on this machine, in a few words; None where they run."""
    if platform.system() != "Linux":
        return f"no native kernels on {platform.system()}"
    if "avx512_bf16" not in _cpu().split():
        return "the CPU has no AVX512-BF16"
    if not any(shutil.which(name) for name in COMPILERS):
        return "no C++ compiler"
    try:
        library(Path(__file__).with_name("probe.cpp"))
    except (OSError, subprocess.SubprocessError) as error:
        return f"they do not compile: {_first_line(error)}"
    return None


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The functions of a kernel file, compiled unless this machine has compiled it before."""
    folder = Path.home() / ".cache" / "moebius" / "kernels"
    path = folder / f"{source.parent.name}-{_key(source)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / path.name
            subprocess.run(_command(source, made), check=True, capture_output=True, text=True)
            os.replace(made, path)
    return ctypes.CDLL(str(path))


def address(x: Tensor | None, strided: bool = False) -> ctypes.c_void_p:
    """Where a tensor begins (null for None), as kernels take it; contiguous unless `strided`."""
    if x is None:
        return ctypes.c_void_p(None)
    if x.device.type != "cpu" or not (strided or x.is_contiguous()):
        raise ValueError("a native kernel takes contiguous tensors on the CPU")
    return ctypes.c_void_p(x.data_ptr())


def rows_apart(x: Tensor) -> tuple[Tensor, int]:
    """The rows [N, D] of [..., D] and how many elements they lie apart; a copy if need be."""
    evenly = x.stride(-1) == 1 or x.shape[-1] == 1
    for i in range(x.ndim - 2):
        evenly = evenly and x.stride(i) == x.stride(i + 1) * x.shape[i + 1]
    x_ND = (x if evenly else x.contiguous()).view(-1, x.shape[-1])
    return x_ND, x_ND.stride(0)


def integer(x: int) -> ctypes.c_int64:
    """A size, as kernels take it."""
    return ctypes.c_int64(x)


def real(x: float) -> ctypes.c_double:
    """A number, as kernels take it."""
    return ctypes.c_double(x)


def threads() -> ctypes.c_int64:
    """How many threads a kernel may use: as many as torch."""
    return ctypes.c_int64(torch.get_num_threads())


def _command(source: Path, made: Path) -> list[str]:
    compiler = next(found for found in map(shutil.which, COMPILERS) if found)
    includes = [f"-I{path}" for path in (Path(__file__).parent, *include_paths())]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    ends = ["-ltorch_cpu", "-lc10", "-o", str(made)]
    return [compiler, *FLAGS, *includes, str(source), *libraries, *ends]


@functools.cache
def _cpu() -> str:
    """The flags of the CPU, which `-march=native` compiles for."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "")


def _key(source: Path) -> str:
    parts = [path.read_bytes() for path in (source, *HEADERS)]
    parts += [text.encode() for text in (*FLAGS, torch.__version__, torch.__file__, _cpu())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines()
    return lines[0].strip() if lines else type(error).__name__
