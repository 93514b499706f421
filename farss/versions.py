"""What a result depends on beside its options."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import torch

from farss.config import ModelConfig
from farss.models import device_of
from farss.precision import multiplies_in


def versions() -> dict[str, str]:
    """Versions of what a result depends on, the machine, and the commit where there is one."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")}
    with suppress(importlib.metadata.PackageNotFoundError):  # of the extra `eval`
        found["lm_eval"] = importlib.metadata.version("lm_eval")
    found["farss"] = _own_version()
    found["python"] = platform.python_version()
    found["machine"] = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads" + (
        f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ", no GPU"
    )
    if not multiplies_in(torch.bfloat16, device_of(ModelConfig())):
        found["machine"] += ", no units for bfloat16 products: computes in float32"
    found["date"] = time.strftime("%Y-%m-%d")
    return found


def _own_version() -> str:
    version = importlib.metadata.version("farss")
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed, perhaps inside a repository of something else
        return version
    with suppress(OSError):  # a machine without git
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        if commit.returncode == 0:
            return f"{version} ({commit.stdout.strip()})"
    return version
