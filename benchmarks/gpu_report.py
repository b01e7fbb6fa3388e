"""What gpu.sh measured, made short: tables, bars with verdicts, or a trace's longest kernels.

    python benchmarks/gpu_report.py summary results.jsonl
    python benchmarks/gpu_report.py kernels trace.json

Start at summary, then BARS; and at kernels. A part that failed, or in which something failed, makes
"ok" false, which gpu.sh looks at; a bar that is missed does not.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import exit_code, log

TOP = 15  # kernels shown
WIDEST = 90  # characters of a kernel's name
MODES = "bf16", "int8", "int4"
Found = dict[str, Any]  # what the parts said, by their names


def summary(args: argparse.Namespace) -> dict[str, Any]:
    """The last lines of gpu.sh: what was measured, against what, and whether all went well."""
    lines = [json.loads(line) for line in args.file.read_text().splitlines()]
    found = {line["part"]: line["figures"] for line in lines if line["figures"]}
    parts = {line["part"]: {k: line[k] for k in ("rc", "seconds")} for line in lines}
    failed = list(failures(lines))
    log(f"\n{'part':28} {'rc':>4} {'s':>5}")
    for line in lines:
        log(f"{line['part']:28} {line['rc']:4} {line['seconds']:5} {remark(line['figures'] or {})}")
    figures = {"decode": decode_table(found), "prefill": prefill_table(found)}
    figures |= other_figures(found)
    bars = list(judged(found))
    show_bars(bars)
    log("\n".join(["", *(f"FAILED: {what}" for what in failed)]) if failed else "\nno part failed")
    said = provenance_of(found)
    return {"ok": not failed, "failed": failed, "bars": bars, **figures, "parts": parts} | said


def failures(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Parts that ended badly, and what parts say has failed in them."""
    if not lines:
        yield "no part was run"
    for line in lines:
        if line["rc"]:
            why = " (out of time)" if line["rc"] in (124, 137) else ""
            yield f"{line['part']}: code {line['rc']}{why}"
        yield from (f"{line['part']}: {what}" for what in (line["figures"] or {}).get("failed", []))


def remark(figures: dict[str, Any]) -> str:
    """A few words on a part."""
    if "checks" in figures:
        return f"{figures['checks'] - len(figures['failed'])} of {figures['checks']} checks passed"
    if isinstance(figures.get("tokens_per_s"), dict):  # generate.py --bench
        rates = {k: statistics.median(v) for k, v in figures["tokens_per_s"].items()}
        return ", ".join(f"{test} {rate:.1f} tokens/s" for test, rate in rates.items())
    if figures.get("benchmark") == "gpu_products":
        return f"int4 {figures['int4_over_tinygemm']:.2f} times as fast as tinygemm"
    return ""


def at(found: Any, *path: str) -> Any:
    """What lies there in nested dictionaries; None where something on the way is missing."""
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def rate(found: Found, mode: str, rows: str) -> float | None:
    return at(found, f"decode_{mode}", "decode", rows, "tokens_per_s", "median")


def best_prefill(found: Found, mode: str, shape: str) -> float | None:
    """Tokens per second, eager or compiled."""
    ways = at(found, f"decode_{mode}", "prefill", shape) or {}
    return max((of["median"] for of in ways.values()), default=None)


def decode_table(found: Found) -> list[dict[str, Any]]:
    """Of each precision and number of rows; shares are of bytes read per second."""
    rows = []
    for mode in MODES:
        part = found.get(f"decode_{mode}") or {}
        for count, of in part.get("decode", {}).items():
            reads = of["bytes_per_s"]["median"]
            row = {"mode": mode, "rows": int(count), "tokens_per_s": of["tokens_per_s"]["median"]}
            row |= {"bytes_per_s": reads, "of_nominal": over(reads, part["nominal_bytes_per_s"])}
            row["of_measured"] = over(reads, part.get("read_bytes_per_s"))
            rows.append(row | {"over_bf16": over(row["tokens_per_s"], rate(found, "bf16", count))})
    modes = at(found, "gptfast", "modes") or {}
    for mode, of in modes.items():
        row = {"mode": f"gpt-fast {mode}", "rows": 1, "tokens_per_s": of["tokens_per_s"]}
        reads, ours = of["bytes_per_s"], found.get("decode_bf16") or {}
        row |= {"bytes_per_s": reads, "of_nominal": over(reads, ours.get("nominal_bytes_per_s"))}
        row["of_measured"] = over(reads, ours.get("read_bytes_per_s"))
        row["over_bf16"] = over(of["tokens_per_s"], at(modes, "bf16", "tokens_per_s"))
        rows.append(row | {"ours_over_it": over(rate(found, mode, "1"), of["tokens_per_s"])})
    if rows:
        log(f"\n{'decode':14} rows  tokens/s    GB/s  nominal measured  over bf16")
    for row in rows:
        ours = f"; ours over it {number(row.get('ours_over_it'))}" if "ours_over_it" in row else ""
        log(
            f"{row['mode']:14} {row['rows']:4} {row['tokens_per_s']:9.1f} "
            f"{row['bytes_per_s'] / 1e9:7.0f} {number(row['of_nominal']):>8} "
            f"{number(row['of_measured']):>8} {number(row['over_bf16']):>10}{ours}"
        )
    return rows


def prefill_table(found: Found) -> list[dict[str, Any]]:
    rows = []
    for mode in MODES:
        for shape, ways in (at(found, f"decode_{mode}", "prefill") or {}).items():
            row = {"mode": mode, "shape": shape} | {how: of["median"] for how, of in ways.items()}
            best = best_prefill(found, mode, shape)
            rows.append(row | {"over_bf16": over(best, best_prefill(found, "bf16", shape))})
    if rows:
        log(f"\n{'prefill':14} {'prompts':>8}     eager  compiled tokens/s  over bf16")
    for row in rows:
        eager, compiled = (number(row.get(how), 0) for how in ("eager", "compiled"))
        ratio = number(row["over_bf16"])
        log(f"{row['mode']:14} {row['shape']:>8} {eager:>9} {compiled:>9} {ratio:>19}")
    return rows


def other_figures(found: Found) -> dict[str, Any]:
    """Compile seconds, verify passes, speculation, offload and GPTQ, as said and as kept."""
    compiling = {name: at(part, "compile_s") for name, part in found.items() if "compile_s" in part}
    if compiling:
        log("\nseconds of compiling (cold: with empty caches; warm_*: while others compiled)")
    for name, times in compiling.items():
        times = times if isinstance(times, dict) else {"all": times}
        log(f"{name:22} " + ", ".join(f"{what} {took:.1f}" for what, took in times.items()))
    verifying = {mode: at(found, f"decode_{mode}", "verify", "over_step") for mode in MODES}
    drafts = {
        f"{name}, {how}": of["speed_up"]["median"]
        for name, draft in (at(found, "speculate", "drafts") or {}).items()
        for how, of in (at(draft, "synthetic") or {}).items()
    }
    if drafts:
        log("")
    for name, ratio in drafts.items():
        log(f"draft {name}: {ratio:.2f}x plain decoding")
    offload, gptq = found.get("offload") or {}, found.get("gptq") or {}
    for name, of in (offload.get("weights") or {}).items():
        if of:
            log(
                f"offload, {name}: {of['tokens_per_s']['median']:.1f} tokens/s, "
                f"{of['bytes_per_s']['median'] / 1e9:.1f} GB/s, "
                f"{of['of_copy_rate']['median']:.2f} of the bare copy's rate"
            )
    if gptq:
        log(
            f"GPTQ: {gptq['seconds_per_billion']:.0f} s per billion weights, "
            f"{gptq['samples']} texts of {gptq['length']} tokens"
        )
    return {
        "compile_s": compiling,
        "verify_over_step": {m: v["median"] for m, v in verifying.items() if v},
        "speculation": drafts,
        "offload": {k: offload.get(k) for k in ("weights", "speed_up", "peak_bytes")},
        "gptq_seconds_per_billion": gptq.get("seconds_per_billion"),
    }


def of_nominal(found: Found) -> float | None:
    part = found.get("decode_bf16") or {}
    reads = at(part, "decode", "1", "bytes_per_s", "median")
    return over(reads, part.get("nominal_bytes_per_s"))


def faster(mode: str, rows: str) -> Callable[[Found], float | None]:
    return lambda found: over(rate(found, mode, rows), rate(found, "bf16", rows))


def prefilled(mode: str, shape: str) -> Callable[[Found], float | None]:
    return lambda found: over(best_prefill(found, mode, shape), best_prefill(found, "bf16", shape))


def where(*path: str) -> Callable[[Found], float | None]:
    return lambda found: at(found, *path)


def by_small_draft(found: Found) -> float | None:
    """Its speed-up where the number of draft tokens is chosen, as it is by default."""
    drafts = at(found, "speculate", "drafts") or {}
    small = next((of for name, of in drafts.items() if name != "self-int4"), None)
    runs = (at(small, "synthetic") or {}).items()
    return next((of["speed_up"]["median"] for how, of in runs if how.endswith("auto")), None)


def warm_start(found: Found) -> float | None:
    """The longest that a fresh process takes for the step of one row."""
    times = [at(found, f"decode_{mode}", "compile_s", "decode 1") for mode in MODES]
    return max(filter(None, times), default=None)


# What is judged, how it is found, and what it is to reach (">=") or may reach at most ("<=").
BARS: list[tuple[str, Callable[[Found], float | None], str, float]] = [
    ("bf16, 1 row: share of the nominal read rate", of_nominal, ">=", 0.78),
    ("int8, 1 row, over bf16", faster("int8", "1"), ">=", 1.75),
    ("int4, 1 row, over bf16", faster("int4", "1"), ">=", 2.5),
    ("int4, 8 rows, over bf16", faster("int4", "8"), ">=", 2.0),
    ("int4, 64 rows, over bf16", faster("int4", "64"), ">=", 1.0),
    *(
        (f"{mode}, prefill {shape}, over bf16", prefilled(mode, shape), ">=", 0.9)
        for shape in ("8x128", "1x2048")
        for mode in ("int8", "int4")
    ),
    *(
        (
            f"{mode}, verifying 6 tokens, over a step",
            where(f"decode_{mode}", "verify", "over_step", "median"),
            "<=",
            1.2,
        )
        for mode in ("bf16", "int4")
    ),
    ("small draft at acceptance 0.8, over plain", by_small_draft, ">=", 1.8),
    (
        "offload, 16 bits: share of the bare copy's rate",
        where("offload", "weights", "16 bits", "of_copy_rate", "median"),
        ">=",
        0.85,
    ),
    ("offload, 4 bits over 16", where("offload", "speed_up"), ">=", 2.5),
    ("GPTQ: seconds per billion weights", where("gptq", "seconds_per_billion"), "<=", 96),
    ("compiling, cold: seconds", where("decode_bf16", "compile_s", "cold"), "<=", 25),
    ("compiling, warm: seconds, the longest of all", warm_start, "<=", 5),
]


def judged(found: Found) -> Iterator[dict[str, Any]]:
    for name, find, relation, bar in BARS:
        value = find(found)
        met = None if value is None else value >= bar if relation == ">=" else value <= bar
        yield {"name": name, "value": value, "bar": f"{relation} {bar}", "met": met}


def show_bars(bars: list[dict[str, Any]]) -> None:
    log("")
    for bar in bars:
        if bar["met"] is not None:
            verdict = "met" if bar["met"] else "MISSED"
            log(f"{bar['name']:48} {number(bar['value']):>9}  {bar['bar']:>8}  {verdict}")
    if unknown := [bar["name"] for bar in bars if bar["met"] is None]:
        log(f"not measured: {'; '.join(unknown)}")


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def provenance_of(found: Found) -> dict[str, Any]:
    """Of the first part that says it."""
    keys = "commit", "machine", "torch", "date", "nominal_bytes_per_s"
    told = [figures for figures in found.values() if figures.get("benchmark") != "gpt_fast"]
    told.sort(key=lambda figures: "nominal_bytes_per_s" not in figures)
    return {key: next((f[key] for f in told if key in f), None) for key in keys}


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
    lines = [
        f"{args.file.stem}: {len(found)} kernels in {span / 1e3:.1f} ms, which they fill to "
        f"{busy / span:.0%}",
        f"{'ms':>9} {'share':>6} {'calls':>7} {'us each':>8}",
    ]
    for name, time in took.most_common(TOP):
        figures = f"{time / 1e3:9.2f} {time / busy:6.1%} {times[name]:7} {time / times[name]:8.1f}"
        lines.append(f"{figures} {name[:WIDEST]}")
    log("\n".join(lines))
    if args.append:
        with args.append.open("a") as file:
            print(*lines, sep="\n", file=file)
    return {"kernels": len(found), "span_us": span, "busy_us": busy}


def main(args: argparse.Namespace) -> dict[str, Any]:
    return {"summary": summary, "kernels": kernels}[args.what](args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("what", choices=["summary", "kernels"])
    add("file", type=Path, help="gpu.sh's results.jsonl, or a trace of generate.py --profile")
    add("--append", type=Path, metavar="TEXT", help="a file that the longest kernels go to as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(exit_code(main, parse_args()))
