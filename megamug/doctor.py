"""`megamug doctor`: what of this machine and its packages can be used, what stands in for the rest, what to mend.

Packages are looked up and imported here and nowhere else for their own sake; each line tells what the package is for.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

GIB = 2**30
DRIVER = Path("/proc/driver/nvidia/version")
LITTLE_DISK, LITTLE_SHARED_MEMORY, FEW_FILES = 10 * GIB, GIB, 4096


@dataclass(frozen=True)
class Package:
    """A package: where to import it from, which versions fit, what it is for, what stands in, how to get it."""

    name: str
    module: str
    versions: str  # as in pyproject.toml; empty: any
    used_for: str
    stands_in: str  # empty: nothing does, and training cannot run without it
    get: str


TE = "in the checkout of megamug: pip install --no-build-isolation -e '.[te]'"
APEX = "in a checkout of NVIDIA/apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
PACKAGES = (
    Package("torch", "torch", ">=2.10,<2.14", "tensors, autograd, process groups", "",
            'pip install "torch>=2.10,<2.14"'),
    Package("megatron-core", "megatron.core", ">=0.16.1,<0.20", "tensor, sequence, pipeline and data parallelism;"
            " checkpoints", "", 'pip install "megatron-core>=0.16.1,<0.20"'),
    Package("nvidia-dali-cuda130", "nvidia.dali", ">=2.1", "decoding and cropping of images, on CPU and GPU", "",
            'pip install "nvidia-dali-cuda130>=2.1"'),
    Package("sentencepiece", "sentencepiece", "", "tokens of captions", "", "pip install sentencepiece"),
    Package("tokenizers", "tokenizers", ">=0.20", "tokenizer.json of other models", "",
            'pip install "tokenizers>=0.20"'),
    Package("psutil", "psutil", "", "Megatron-core's checkpoint writer, which hangs without it", "",
            "pip install psutil"),
    Package("pyyaml", "yaml", "", "configuration files", "", "pip install pyyaml"),
    Package("numpy", "numpy", "", "the order of samples", "", "pip install numpy"),
    Package("pillow", "PIL", ">=12.2", "pictures", "", 'pip install "pillow>=12.2"'),
    Package("safetensors", "safetensors", "", "weights that enter and leave", "", "pip install safetensors"),
    Package("tensorboard", "tensorboard", "", "curves and pictures of a run",
            "metrics.jsonl, with log.tensorboard=false", "pip install tensorboard"),
    Package("transformer-engine", "transformer_engine.pytorch", ">=2.9", "FP8 and fused layers on GPUs",
            "plain torch layers (precision.layers=local), without FP8", TE),
    Package("apex", "apex", "", "Megatron-core's fused weight gradients and optimizer on GPUs",
            "Transformer Engine's or torch's optimizer, unfused gradients", APEX),
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Versions of Megatron-core, and those of Transformer Engine that have all that these import of it."""

    megatron: str
    engine: str
    otherwise: str  # what is lost


# Read in the sources of 0.16.1, 0.17.1, 0.18.0 and 0.19.2, and of Transformer Engine 2.13, 2.14 and 2.20. 0.16 names
# 2.9 to 2.11 as its own; what it imports is still there in 2.20.
PAIRS = (
    Pair(">=0.16,<0.17", ">=2.9", "its layers and FP8 recipes"),
    Pair(">=0.17,<0.20", ">=2.14", "multi_tensor_scale_tensor: Megatron then does without its kernels for many tensors"
         " at once"),
)  # fmt: skip


@dataclass
class Finding:
    """One line. `status`: ok; absent (something stands in); problem (training runs, or runs ill); fatal."""

    name: str
    status: str
    found: str
    used_for: str = ""
    stands_in: str = ""
    do: str = ""


@dataclass
class Report:
    """All findings; training can run where none is fatal."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def can_train(self) -> bool:
        return all(finding.status != "fatal" for finding in self.findings)


def run(as_json: bool) -> int:
    """Prints the report; returns 0 when training can run on this machine, else 1."""
    report = examine()
    if as_json:
        print(json.dumps({"can_train": report.can_train, "findings": [asdict(f) for f in report.findings]}, indent=2))
    else:
        print(table(report))
    return 0 if report.can_train else 1


def examine() -> Report:
    """Looks at packages, compiled losses, GPUs and the machine."""
    packages = [examine_package(package) for package in PACKAGES]
    report = Report([_python(), *packages, *_pair()])
    if packages[0].status == "ok":  # torch
        report.findings += [_losses(), *_gpus()]
    report.findings += [_nvcc(), _processors(), *_space(), _open_files()]
    return report


def table(report: Report) -> str:
    """The report for people: a line for each finding, then what to do about those that are not ok."""
    width = max(len(finding.name) for finding in report.findings)
    lines = []
    for finding in report.findings:
        use = f"  ({finding.used_for})" if finding.used_for else ""
        lines.append(f"{finding.status:8}{finding.name:{width}}  {finding.found}{use}")
        if finding.status != "ok" and finding.stands_in:
            lines.append(f"{'':8}{'':{width}}  instead: {finding.stands_in}")
        if finding.status != "ok" and finding.do:
            lines.append(f"{'':8}{'':{width}}  to do: {finding.do}")
    fatal = ", ".join(finding.name for finding in report.findings if finding.status == "fatal")
    lines.append("Training can run here." if report.can_train else f"Training cannot run here until mended: {fatal}.")
    return "\n".join(lines)


def examine_package(package: Package) -> Finding:
    """Whether the package is there, in a version that fits, and can be imported."""
    bad = "problem" if package.stands_in else "fatal"
    about = dict(used_for=package.used_for, stands_in=package.stands_in, do=package.get)
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(package.name, "absent" if package.stands_in else "fatal", "not installed", **about)
    if not _fits(version, package.versions):
        return Finding(package.name, bad, f"{version}, but {package.versions} is needed", **about)
    try:
        with warnings.catch_warnings():  # what Megatron-core says of missing packages stands in the report
            warnings.simplefilter("ignore")
            importlib.import_module(package.module)
    except Exception as error:  # a package may fail in any way when it meets another build of torch or CUDA
        reason = " ".join(str(error).split())[:200]
        return Finding(package.name, bad, f"{version}, but it cannot be imported: {reason}", **about)
    return Finding(package.name, "ok", version, **about | {"do": ""})


def _pair() -> list[Finding]:
    """Whether Megatron-core and Transformer Engine, where both are there, go together."""
    try:
        megatron, engine = (importlib.metadata.version(name) for name in ("megatron-core", "transformer-engine"))
    except importlib.metadata.PackageNotFoundError:
        return []
    pair = next((pair for pair in PAIRS if _fits(megatron, pair.megatron)), None)
    if pair is None:
        return []  # this Megatron-core does not fit, which stands above
    name, found = "the two together", f"megatron-core {megatron} with transformer-engine {engine}"
    if _fits(engine, pair.engine):
        return [Finding(name, "ok", found)]
    return [Finding(name, "problem", f"{found}, which lacks {pair.otherwise}; {pair.engine} has it", do=TE)]


def _fits(version: str, wanted: str) -> bool:
    """Whether release `version` is in a range such as `>=2.10,<2.14`; `2.13.0+cpu` counts as 2.13.0."""
    for clause in filter(None, wanted.split(",")):
        operator, bound = re.fullmatch(r"(>=|<)([\d.]+)", clause).groups()
        if (_release(version) >= _release(bound)) != (operator == ">="):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    numbers = [int(number) for number in re.match(r"\d+(?:\.\d+)*", version).group().split(".")]
    return tuple(numbers + [0] * (4 - len(numbers)))


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _losses() -> Finding:
    from megamug.losses import ops

    libraries = ops.libraries()
    return Finding(
        "compiled losses", "ok" if libraries.cpu else "absent", libraries.reason, "losses near the memory limit",
        "" if libraries.cpu else "the same losses in plain torch", "" if libraries.cpu else
        "install a C++ compiler and run: pip install --no-build-isolation -e .",
    )  # fmt: skip


def _gpus() -> list[Finding]:
    """GPUs as torch sees them, the driver, NCCL."""
    import torch

    driver = _driver()
    count = torch.cuda.device_count()
    cpu = "the CPU: the same program, slower"
    if count:
        found = []
        for index in range(count):
            gpu = torch.cuda.get_device_properties(index)
            found.append(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB, capability {gpu.major}.{gpu.minor})")
        names = "; ".join(f"{found.count(name)} x {name}" for name in dict.fromkeys(found))
        gpus = Finding("GPUs", "ok", names)
    elif driver is None:
        gpus = Finding("GPUs", "absent", "none", "speed", cpu, "nothing, unless this machine has a GPU: then install"
                       " its driver")
    elif torch.version.cuda is None:
        gpus = Finding("GPUs", "problem", f"driver {driver}, but this torch ({torch.__version__}) is built for the CPU",
                       "speed", cpu, "install a CUDA build of torch")
    else:
        gpus = Finding("GPUs", "problem", f"driver {driver}, but torch built for CUDA {torch.version.cuda} sees no GPU",
                       "speed", cpu, "check CUDA_VISIBLE_DEVICES and that the driver is new enough for this CUDA")
    findings = [gpus, Finding("driver", "ok" if driver else "absent", driver or "no NVIDIA driver")]
    if torch.version.cuda is not None and torch.distributed.is_nccl_available():
        version = ".".join(str(number) for number in torch.cuda.nccl.version())
        findings.append(Finding("NCCL", "ok", version, "collectives between GPUs"))
    else:
        findings.append(Finding("NCCL", "problem" if count else "absent", "not in this torch",
                                "collectives between GPUs", "gloo, on the CPU",
                                "install a CUDA build of torch" if driver else ""))
    return findings


def _driver() -> str | None:
    """Version of the NVIDIA driver, None without one: what the kernel says, or, as in some containers, NVML."""
    told = DRIVER.read_text() if DRIVER.exists() else ""
    # "NVIDIA UNIX x86_64 Kernel Module  535.104.05 ..." or "NVIDIA UNIX Open Kernel Module for x86_64  580.159 ..."
    match = re.search(r"Kernel Module(?: +for +\S+)? +(\d+(?:\.\d+)+)", told)
    if match:
        return match.group(1)
    return _nvml_driver() or ("of unknown version" if told else None)


def _nvml_driver() -> str | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE of nvml.h
    failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
    nvml.nvmlShutdown()
    return None if failed else text.value.decode()


def _nvcc() -> Finding:
    about = ("compiling the CUDA losses", "what is already built, or plain torch")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        return Finding("nvcc", "absent", "not found", *about,
                       "to build them here, install the CUDA 13 toolkit and set CUDA_HOME")
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
    match = re.search(r"release ([\d.]+)", output.stdout)
    if match is None:
        return Finding("nvcc", "problem", f"{nvcc} does not say its version", *about, "reinstall the CUDA toolkit")
    return Finding("nvcc", "ok", f"{match.group(1)} ({nvcc})", *about)


def _processors() -> Finding:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return Finding("CPU", "ok", f"{usable} of {present} cores usable, {memory:.0f} GiB of memory")


def _space() -> list[Finding]:
    """Free disk here (checkpoints) and free shared memory (NCCL, worker processes)."""
    places = (
        ("disk", Path.cwd(), LITTLE_DISK, "checkpoints and metrics",
         "free some, or set run_dir on a larger disk and keep fewer checkpoints (checkpoint.keep)"),
        ("shared memory", Path("/dev/shm"), LITTLE_SHARED_MEMORY, "NCCL and processes of one machine",
         "enlarge it: mount -o remount,size=8G /dev/shm, or start the container with --shm-size=8g"),
    )  # fmt: skip
    findings = []
    for name, path, little, used_for, do in places:
        if not path.is_dir():
            findings.append(Finding(name, "problem", f"{path} is not there", used_for, "", f"provide {path}"))
            continue
        free = shutil.disk_usage(path).free
        status = "problem" if free < little else "ok"
        findings.append(Finding(name, status, f"{free / GIB:.1f} GiB free at {path}", used_for, "", do))
    return findings


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    few = soft != endless and soft < FEW_FILES
    raised = "65536" if hard == endless or hard >= 65536 else str(hard)
    return Finding(
        "open files", "problem" if few else "ok", "no limit" if soft == endless else f"at most {soft}",
        "shards, sockets between processes", "", f"ulimit -n {raised}" if few else "",
    )  # fmt: skip
