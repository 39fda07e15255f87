"""What this machine has, and what ftengine will therefore use."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "nvidia-dali-cuda130",
    "cupy-cuda13x",
    "monai",
    "zarr",
    "numcodecs",
    "tensorstore",
    "numpy",
    "pyarrow",
    "SimpleITK",
    "nibabel",
    "pydicom",
)


def examine() -> dict[str, Any]:
    """Python, memory, cores, disk, packages, GPUs, and for each stage the device it will run on, as plain values."""
    import torch

    gpus = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        gpus.append(
            {
                "name": properties.name,
                "memory_gb": properties.total_memory / 1e9,
                "compute": f"{properties.major}.{properties.minor}",
            }
        )
    problems = _problems(gpus)
    device = "cuda" if gpus and not problems else "cpu"
    return {
        "ftengine": metadata.version("ftengine"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "shared_memory_gb": shutil.disk_usage("/dev/shm").total / 1e9 if Path("/dev/shm").exists() else None,  # noqa: S108 - asked, not used
        "free_disk_gb": shutil.disk_usage(Path.cwd()).free / 1e9,
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda_of_torch": torch.version.cuda,
        "gpus": gpus,
        "will_use": {
            "reading": "tensorstore threads",
            "crop and augmentation": f"DALI on {device}",
            "kernels": "CuPy" if device == "cuda" else "torch on the CPU",
            "networks": f"torch on {device}",
        },
        "problems": problems,
    }


def _problems(gpus: list[dict[str, Any]]) -> list[str]:
    problems = []
    if gpus and _version("cupy-cuda13x") is None:
        problems.append("a GPU is there but CuPy is not: pip install 'ftengine[cuda]'")
    problems += [
        f"{gpu['name']} has compute capability {gpu['compute']}; CUDA 13 starts at 7.5"
        for gpu in gpus
        if float(gpu["compute"]) < 7.5
    ]
    codec = _version("nvidia-libnvcomp-cu13")
    if codec is not None and int(codec.split(".", maxsplit=1)[0]) >= 6:
        problems.append(
            f"nvidia-libnvcomp-cu13 {codec} breaks DALI 2.4: pip install -c constraints.txt nvidia-libnvcomp-cu13"
        )
    return problems


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return None
