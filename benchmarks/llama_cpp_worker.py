"""llama.cpp behind a pipe: a prompt in, its times out, one line of JSON each.

Started by decode.py in the Python environment that has llama-cpp-python. It blocks on stdin, and
so takes no CPU, while the other side runs. Start at main; `timed` is the measurement.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import gguf
import llama_cpp


def main(args: argparse.Namespace) -> None:
    # llama.cpp may print: what it prints goes to stderr, and stdout stays a line of JSON a reply.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    llm = llama_cpp.Llama(
        str(args.model),
        n_ctx=args.context,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        verbose=False,
    )
    print(json.dumps({"weight_bytes": weight_bytes(args.model)}), file=replies)
    for line in sys.stdin:
        print(json.dumps(timed(llm, **json.loads(line))), file=replies)


def timed(llm: llama_cpp.Llama, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """Greedy: the first token, then as many more as asked for. cpu_*: the process's CPU time."""
    cpu_before = time.process_time()
    llm.reset()  # or generate() would skip what an earlier prompt has in common with this one
    start = time.perf_counter()
    tokens = llm.generate(prompt, temp=0.0)
    next(tokens)
    first = time.perf_counter()
    for _ in range(new_tokens):
        next(tokens)
    return {
        "prefill_s": first - start,
        "decode_s": time.perf_counter() - first,
        "cpu_before": cpu_before,
        "cpu_after": time.process_time(),
    }


def weight_bytes(path: Path) -> int:
    """What decoding one token reads: all tensors but the looked-up embedding."""
    tensors = gguf.GGUFReader(path).tensors
    return sum(int(t.n_bytes) for t in tensors if t.name != "token_embd.weight")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a GGUF file")
    add("--context", type=int, default=512)
    add("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
