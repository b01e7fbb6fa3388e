"""What the parts of gpu.sh share: attempts, one of which may fail, and what cards should read."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from benchmarks.common import log

T = TypeVar("T")
# Bytes per second that a card's memory is sold with; the first name that a device's name contains.
NOMINAL = {
    "H200": 4.8e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "B200": 8e12,
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB PCIe": 1.935e12,
    "A100": 1.555e12,
    "RTX 4090": 1.008e12,
    "RTX 3090": 0.936e12,
    "L4": 0.3e12,
}


def nominal(machine: str) -> float | None:
    """None where the card is not known. Its name is compared word for word: an L40 is no L4."""
    padded = f" {machine.removesuffix('-SXM4-40GB')} "
    return next((rate for name, rate in NOMINAL.items() if f" {name} " in padded), None)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """What one call takes, with all that it launches."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class Attempts:
    """Calls after one another: one that fails is noted, and the others are made all the same."""

    def __init__(self):
        self.failed: list[str] = []
        self.stopped = False

    def __call__(self, what: str, call: Callable[[], T]) -> T | None:
        """What the call returns; None where it fails. After a Ctrl-C nothing more is called."""
        if self.stopped:
            return None
        try:
            return call()
        except KeyboardInterrupt:
            self.stopped = True
            self.failed.append(f"{what}: stopped")
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            self.failed.append(f"{what}: {type(error).__name__}: {message}")
        log(self.failed[-1])
        return None
