"""Whose notices are watched. The cloud is told by what its firmware says of the machine: no request is made to find out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from launch.notices.aws import Aws
from launch.notices.azure import Azure
from launch.notices.gcp import Gcp
from launch.notices.metadata import ADDRESS, ENVIRONMENT, Service
from supervisor.noticing import Source

FIRMWARE: Final = Path("/sys/class/dmi/id")
HYPERVISOR: Final = Path("/sys/hypervisor/uuid")
_AZURE_TAG: Final = "7783-7084-3265-9085-8269-3286-77"


def cloud(firmware: Path = FIRMWARE, hypervisor: Path = HYPERVISOR) -> str | None:
    """``aws``, ``gcp``, ``azure``, or None for any other machine."""
    if _read(firmware / "sys_vendor") == "Amazon EC2" or _read(hypervisor).startswith("ec2"):
        return "aws"
    if _read(firmware / "product_name") in ("Google Compute Engine", "Google"):
        return "gcp"
    if _read(firmware / "chassis_asset_tag") == _AZURE_TAG:
        return "azure"
    return None


def source(option: str, environ: Mapping[str, str] = os.environ) -> Source | None:
    """For a value of ``--notices``; None where there is nothing to watch. Raises ConfigError for a wrong address."""
    name = cloud() if option == "auto" else option
    if name not in ("aws", "gcp", "azure"):
        return None
    service = Service(environ.get(ENVIRONMENT) or ADDRESS)
    match name:
        case "aws":
            return Aws(service)
        case "gcp":
            return Gcp(service)
        case _:
            return Azure(service)


def _read(path: Path) -> str:
    """The file's word; empty where it is missing or for others' eyes only."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
