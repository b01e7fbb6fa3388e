"""What is said of several devices, beside what gpt-fast has published of eight A100s."""

import pytest

from hf import model_args
from links import COUNTS, LINKS, pipeline_seconds, table, tensor_parallel_seconds
from plan import step_of
from tests.conftest import llama_config

# Tokens per second by devices, gpt-fast's README; bfloat16, one row. Its head is on every device.
PUBLISHED = {
    "7B": ({}, {1: 104.9, 2: 168.8, 4: 254.0, 8: 328.4}),
}
