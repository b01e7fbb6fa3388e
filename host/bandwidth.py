"""The rate at which a device reads its memory: the ceiling of decoding speed.

Start at measured_bandwidth. bench.py prints a run's rate beside it.
"""

import time

import torch

from host.measurements import load_measurement, save_measurement
from host.memory import available_memory, machine_name, page_aligned

# Bytes read to measure bandwidth: more than any cache holds, and long beside a launch.
READ_BYTES = {"cpu": 2**30, "mps": 2**30, "cuda": 2**33}


def saved_bandwidth(device: torch.device) -> float | None:
    """What measured_bandwidth has found on this machine before."""
    return load_measurement("bandwidth", bandwidth_key(device))


def measured_bandwidth(device: torch.device) -> float:
    """read_bandwidth's figure, kept for the reports of later runs."""
    save_measurement("bandwidth", bandwidth_key(device), found := read_bandwidth(device))
    return found


def bandwidth_key(device: torch.device) -> tuple[str, str]:
    return machine_name(device), torch.__version__


def read_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second at which this device's memory can be read: the best of some passes.

    They are by the two fastest reductions, of which one leads on Intel's CPUs and one on AMD's, and
    through huge pages, as weights are read.
    """
    nbytes = min(READ_BYTES[device.type], available_memory(device) // 4) // 8 * 8
    numbers = page_aligned(nbytes, device).fill_(1).view(torch.float32)  # untouched is not there
    a, b = numbers.chunk(2)
    seconds = []
    for reduction in repeats * (lambda: torch.dot(a, b), numbers.amax):
        start = time.perf_counter()
        reduction().item()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)
