"""Measures the rate at which a device reads its memory, which limits the speed of decoding.

Start at measured_bandwidth. bench.py compares it with the bytes per second that a run has read.
"""

import time

import torch

from host.measurements import load_measurement, save_measurement
from host.memory import available_memory, machine_name, page_aligned

# Size of the buffer that is read, by device type: larger than any cache, and its reading takes far
# longer than the launch of a kernel.
READ_BYTES = {"cpu": 2**30, "mps": 2**30, "cuda": 2**33}


def saved_bandwidth(device: torch.device) -> float | None:
    """Returns the bytes per second that measured_bandwidth has saved for this device, or None."""
    return load_measurement("bandwidth", bandwidth_key(device))


def measured_bandwidth(device: torch.device) -> float:
    """Measure a device's bytes per second, and save them for the reports of later runs. Takes
    seconds; an earlier result is not used, see saved_bandwidth."""
    save_measurement("bandwidth", bandwidth_key(device), bandwidth := read_bandwidth(device))
    return bandwidth


def bandwidth_key(device: torch.device) -> tuple[str, str]:
    """Returns what a saved bandwidth depends on, see save_measurement."""
    return machine_name(device), torch.__version__


def read_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Read a large buffer several times; returns the bytes per second of the fastest pass.

    A pass is a reduction over the buffer, `repeats` by dot, the fastest on Intel's CPUs, and
    `repeats` by amax, the fastest on AMD's. The buffer lies in huge pages, as weights do. It is at
    most a quarter of the free memory. If it were smaller than the caches, the result would be too
    high.
    """
    # A multiple of 8: two halves of whole float32 numbers.
    nbytes = min(READ_BYTES[device.type], available_memory(device) // 4) // 8 * 8
    # fill_ makes the system allocate the pages: it maps untouched ones to a single page of zeros.
    numbers = page_aligned(nbytes, device).fill_(1).view(torch.float32)
    first_half, second_half = numbers.chunk(2)
    seconds = []
    for reduction in repeats * (lambda: torch.dot(first_half, second_half), numbers.amax):
        start = time.perf_counter()
        reduction().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)
