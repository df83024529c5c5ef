"""Builds the libraries of `csrc/` into `megamug/losses/_lib/`; everything else is in pyproject.toml.

The CPU library wants a C++20 compiler (`CXX`, default c++, g++ or clang++), the CUDA library nvcc (`CUDA_HOME`, or on
PATH). `MEGAMUG_BUILD_CUDA=1` fails without nvcc, `=0` leaves CUDA out. Without a compiler or without torch nothing is
built, and torch stands in for what they do. Both libraries use torch's stable ABI: one build
serves every Python and every torch from 2.10, CPU or CUDA. Use `pip install --no-build-isolation`, so that the headers
are those of the torch that is installed. `MEGAMUG_BUILD_STRICT=1` makes warnings errors.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = Path("csrc")
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the stable ABI of torch 2.10
WARNINGS = ["-Wall", "-Wextra", "-Werror"] if os.environ.get("MEGAMUG_BUILD_STRICT") == "1" else []
KERNELS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    KERNELS["avx2"] = ["-mavx2", "-mfma"]
    KERNELS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    KERNELS["avx512_bf16"] = [*KERNELS["avx512"], "-mavx512bf16"]
CUDA_ARCHITECTURES = ("80", "90")


def log(message: str) -> None:
    print(f"megamug: {message}", flush=True)


def torch_paths() -> tuple[list[str], Path] | None:
    """(-isystem flags, folder of libtorch) of the torch that runs here."""
    try:
        import torch
    except ImportError:
        return None
    folder = Path(torch.__file__).parent
    include = folder / "include"
    return ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")], folder / "lib"


def cxx() -> str | None:
    wish = os.environ.get("CXX")
    return shutil.which(wish) if wish else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def run(command: list[str]) -> None:
    log(" ".join(command))
    subprocess.run(command, check=True, cwd=ROOT)


def compile_all(jobs: list[list[str]]) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, jobs))


def build_cpu(compiler: str, include: list[str], libtorch: Path, objects: Path, output: Path) -> None:
    common = [compiler, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS, *TARGET, *include]
    # Sums keep their order, infinities and NaN their meaning: these flags only free the compiler from errno and traps.
    arithmetic = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
    jobs = [
        [*common, "-c", str(SOURCES / f"cpu/{name}.cpp"), "-o", str(objects / f"{name}.o")]
        for name in ("operators", "attention", "draw")
    ]
    for name, flags in KERNELS.items():
        source, result = SOURCES / f"cpu/kernels/{name}.cpp", objects / f"kernels_{name}.o"
        jobs.append([*common, *arithmetic, *flags, "-c", str(source), "-o", str(result)])
        # Numbers that are the same everywhere: no multiplication may be fused with an addition.
        exact = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", f"-DFUNCTION=draw_run_{name}"]
        source, result = SOURCES / "cpu/draw_run.cpp", objects / f"draw_run_{name}.o"
        jobs.append([*common, *exact, *flags, "-c", str(source), "-o", str(result)])
    compile_all(jobs)
    link([compiler, "-shared"], jobs, libtorch, output)


def build_cuda(compiler: str, include: list[str], libtorch: Path, objects: Path, output: Path) -> None:
    codes = [flag for a in CUDA_ARCHITECTURES for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    codes += ["-gencode", f"arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}"]
    common = [compiler, "-std=c++20", "-O3", "-DUSE_CUDA", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes]
    jobs = [
        [*common, *TARGET, *include, "-c", str(source.relative_to(ROOT)), "-o", str(objects / f"{source.stem}_cuda.o")]
        for source in sorted((ROOT / SOURCES / "cuda").glob("*.cu"))
    ]
    compile_all(jobs)
    # The CUDA entry points of torch are resolved when the library is loaded, by the torch that loads it.
    link([compiler, "-shared", "-cudart", "static"], jobs, libtorch, output)


def link(command: list[str], jobs: list[list[str]], libtorch: Path, output: Path) -> None:
    """Written aside and moved: a process that has the old library mapped keeps it."""
    aside = output.with_name(f".{output.name}.{os.getpid()}")
    # libtorch.so stays named though no symbol of it is used: in CUDA builds it brings libtorch_cuda.so
    libraries = ["-Xlinker", "--no-as-needed", f"-L{libtorch}", "-ltorch", "-ltorch_cpu", "-lc10"]
    run([*command, *(job[-1] for job in jobs), *libraries, "-o", str(aside)])
    aside.replace(output)


class BuildLosses(build_ext):
    """Compiles `csrc/` beside the sources for an editable install, into the wheel otherwise."""

    def run(self) -> None:
        found, compiler = torch_paths(), cxx()
        demand = os.environ.get("MEGAMUG_BUILD_CUDA", "")
        if demand == "1" and not (found and compiler and nvcc()):
            raise SystemExit("megamug: MEGAMUG_BUILD_CUDA=1 needs torch, a C++ compiler and nvcc (CUDA_HOME)")
        if found is None:
            log("no torch here, so the compiled losses are not built; use pip install --no-build-isolation")
            return
        if compiler is None:
            log("no C++ compiler found: the compiled losses are not built")
            return
        objects = ROOT / "build" / "csrc"
        objects.mkdir(parents=True, exist_ok=True)
        cpu, cuda = (ROOT / name for name in self.get_outputs())
        cpu.parent.mkdir(parents=True, exist_ok=True)
        build_cpu(compiler, *found, objects, cpu)
        cuda_compiler = nvcc() if demand != "0" else None
        if cuda_compiler:
            build_cuda(cuda_compiler, *found, objects, cuda)
        else:
            cuda.unlink(missing_ok=True)  # an old one would not fit the new CPU library
            log("the CUDA losses are not built: " + ("MEGAMUG_BUILD_CUDA=0" if demand == "0" else "no nvcc found"))

    def get_outputs(self) -> list[str]:
        base = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        return [str(base / "megamug/losses/_lib" / f"{name}.so") for name in ("megamug_cpu", "megamug_cuda")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(p.relative_to(ROOT)) for p in (ROOT / SOURCES).rglob("*") if p.is_file()]


class AnyPythonWheel(bdist_wheel):
    """The libraries do not use Python's C API: the wheel depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class PlatformWheel(Distribution):
    def has_ext_modules(self) -> bool:
        return True


# The extension object only tells setuptools that there is something to build; BuildLosses does not read it.
setup(
    distclass=PlatformWheel,
    ext_modules=[Extension("megamug.losses._lib", [])],
    cmdclass={"build_ext": BuildLosses, "bdist_wheel": AnyPythonWheel},
)
