"""What a measurement depends on: device, instruction set, threads, versions."""

import contextlib
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("famba", "torch", "numpy", "triton", "mamba_ssm", "causal_conv1d", "kernels")


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a measurement depends on: `device`, its `instruction_set`, `threads` and `versions`; names no host or path.

    Of the packages, those that are installed; none is imported for it. On CUDA, torch's version of that and the
    driver's are among them; so is the build of each kernel of the hub that was loaded.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if hub := sys.modules.get("kernels"):
        versions |= {f"hub {kernel.metadata.name}": kernel.metadata.id for kernel in hub.get_loaded_kernels()}
    if device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "driver": gpu_driver() or "unknown"}
    return {
        "device": f"{device.type}: {name}",
        "instruction_set": instruction_set(device),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def instruction_set(device: torch.device) -> str:
    """What torch's own kernels are made for here: the compute capability on CUDA, else as torch names a CPU's."""
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.backends.cpu.get_cpu_capability()


def gpu_driver() -> str:
    """Version of the NVIDIA driver, "" where there is none: as the kernel's module says it, else nvidia-smi."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Module .*?(\d+\.[\d.]+)", _DRIVER.read_text(encoding="utf-8")):
            return found[1]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_S, check=True)
        return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
    return ""


_DRIVER = Path("/proc/driver/nvidia/version")
_TIME_LIMIT_S = 20


def _processor() -> str:
    """The processor's name where the system tells it (Linux), else the architecture's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
