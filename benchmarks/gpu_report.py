"""What gpu.sh measured, made short: a table with the ceilings, or a trace's longest kernels.

    python benchmarks/gpu_report.py summary results.jsonl
    python benchmarks/gpu_report.py kernels trace.json

Start at summary and kernels. The nominal ceiling is the H200's, 4.8 TB/s.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import exit_code, log

TOP = 15  # kernels shown
WIDEST = 90  # characters of a kernel's name


def summary(args: argparse.Namespace) -> dict[str, Any]:
    """Of each part: did it end well, tokens per second, and shares of both ceilings."""
    parts = [json.loads(line) for line in args.file.read_text().splitlines()]
    log(f"{'part':24} {'rc':>4} {'s':>5} {'tokens/s':>28} {'TB/s':>6} {'nominal':>8} measured")
    short: dict[str, Any] = {}
    for part in parts:
        figures = part["figures"] or {}
        entry = {"rc": part["rc"], "seconds": part["seconds"]}
        entry |= benched(figures, args.nominal) if "tokens_per_s" in figures else {}
        entry |= speculated(figures) if figures.get("benchmark") == "speculate" else {}
        kept = "checks", "failed", "int4_over_tinygemm"
        entry |= {key: figures[key] for key in kept if key in figures}
        short[part["part"]] = entry
        log(f"{part['part']:24} {part['rc']:4} {part['seconds']:5} {shares(entry)}")
    rates = [
        next((v for k, v in short.get(name, {}).items() if k.startswith("tg")), None)
        for name in ("decode_b1_compiled", "decode_b1_eager")
    ]
    ratio = round(rates[0] / rates[1], 2) if all(rates) else None
    log(f"decode at batch 1, compiled over eager: {ratio}")
    return {"nominal_bytes_per_s": args.nominal, "compiled_over_eager": ratio, "parts": short}


def benched(figures: dict[str, Any], nominal: float) -> dict[str, Any]:
    """What `generate.py --bench --json` said, as medians and shares."""
    reads = figures["decode_bytes_per_s"]
    rates = {test: round(statistics.median(r), 2) for test, r in figures["tokens_per_s"].items()}
    return rates | {
        "decode_bytes_per_s": reads,
        "of_nominal": round(reads / nominal, 4),
        "of_measured": round(reads / figures["read_bytes_per_s"], 4),
        "compile_s": round(figures["compile_s"], 2),
    }


def speculated(figures: dict[str, Any]) -> dict[str, Any]:
    """What speculate.py said of each acceptance, as medians of speed-ups over plain decoding."""
    found = figures["parts"]["synthetic"].items()
    return {"speed_up": {name: of["speed_up"]["median"] for name, of in found}}


def shares(entry: dict[str, Any]) -> str:
    if "speed_up" in entry:
        return ", ".join(f"{name}: {ratio:.2f}x" for name, ratio in entry["speed_up"].items())
    if "int4_over_tinygemm" in entry:
        return f"int4 {entry['int4_over_tinygemm']:.2f} times as fast as tinygemm"
    if "of_nominal" not in entry:
        return f"{len(entry['failed'])} of {entry['checks']} failed" if "failed" in entry else ""
    rates = ", ".join(f"{k} {v}" for k, v in entry.items() if k[:2] in ("pp", "tg"))
    tera = entry["decode_bytes_per_s"] / 1e12
    return f"{rates:>28} {tera:6.2f} {entry['of_nominal']:8.1%} {entry['of_measured']:8.1%}"


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    """The kernels of the later half of a run, decoding only, by the time that each name took."""
    events = [e for e in json.loads(args.file.read_text())["traceEvents"] if e.get("ph") == "X"]
    found = [e for e in events if e.get("cat") == "kernel"]
    found = found or [e for e in events if e.get("cat") == "cpu_op"]  # nested: more than 100 %
    if not found:
        raise ValueError(f"{args.file} holds no kernels: was the run profiled to its end?")
    found.sort(key=lambda event: event["ts"])
    found = found[len(found) // 2 :]
    span = found[-1]["ts"] + found[-1]["dur"] - found[0]["ts"]  # microseconds, as all of these
    took, times = Counter(), Counter()
    for event in found:
        took[event["name"]] += event["dur"]
        times[event["name"]] += 1
    busy = sum(took.values())
    log(f"{len(found)} kernels in {span / 1e3:.1f} ms, which they fill to {busy / span:.0%}")
    log(f"{'ms':>9} {'share':>6} {'calls':>7} {'us each':>8}")
    for name, time in took.most_common(TOP):
        each = time / times[name]
        log(f"{time / 1e3:9.2f} {time / busy:6.1%} {times[name]:7} {each:8.1f} {name[:WIDEST]}")
    return {"kernels": len(found), "span_us": span, "busy_us": busy}


def main(args: argparse.Namespace) -> dict[str, Any]:
    return {"summary": summary, "kernels": kernels}[args.what](args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", choices=["summary", "kernels"])
    add("file", type=Path, help="gpu.sh's results.jsonl, or a trace of generate.py --profile")
    add("--nominal", type=float, default=4.8e12, help="bytes/s of the device (default: an H200's)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))
