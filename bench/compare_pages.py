"""benchmark.md and the plots of compare.py, from benchmark.json, first_step.json, memory.json and profile.json."""

from __future__ import annotations

import json
from math import log10
from pathlib import Path
from typing import Any

NAMES = {
    "ours": "tunesmith",
    "ours-auto": "tunesmith, train.precision auto",
    "ours-compiled": "tunesmith, train.compile",
    "trl-packed": "TRL, packed",
    "trl-padded": "TRL, padded",
    "trainer": "transformers Trainer, padded",
    "minimind": "MiniMind's trainer, padded",
    "limit": "the rate of matrix products",
    "prepare-ours": "preparation by tunesmith",
    "prepare-trl": "preparation by TRL",
}
GOALS: tuple[tuple[str, str, str, float, str], ...] = (
    # case, engine, what, goal, words
    ("26m full", "trl-packed", "ours_over_it", 2.0, "speed over TRL packed, all weights"),
    ("26m lora", "trl-packed", "ours_over_it", 2.4, "speed over TRL + PEFT packed, LoRA"),
    ("26m full", "trl-padded", "ours_over_it", 3.5, "speed over TRL padded, all weights"),
    ("26m full", "ours", "share_of_limit", 0.75, "share of the limit, all weights"),
    ("26m full", "trl-packed", "peak_mb", 0.7, "peak memory over TRL packed's, all weights"),
    ("qwen2.5-0.5b-4-layers full", "trl-packed", "ours_over_it", 1.5, "speed over TRL packed, 0.5B shape, all weights"),
    ("qwen2.5-0.5b-4-layers lora", "trl-packed", "ours_over_it", 1.5, "speed over TRL + PEFT packed, 0.5B shape, LoRA"),
)


def write_pages(folder: Path, found: dict[str, Any]) -> None:
    if "machine" not in found:
        return
    for name in ("first_step", "memory", "profile"):  # of first_step.py, memory.py and profile_step.py
        path = folder / f"{name}.json"
        found = {**found, name: json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}}
    for name, key in (("lengths", "length"), ("sizes", "parameters")):
        if len(rows := found.get(name) or []) > 1:
            (folder / f"benchmark_{name}.svg").write_text(plot(rows, key), encoding="utf-8")
    (folder / "benchmark.md").write_text("\n".join(page(found)) + "\n", encoding="utf-8")


def page(found: dict[str, Any]) -> list[str]:
    machine = found["machine"]
    versions = ", ".join(f"{name} {one}" for name, one in machine["versions"].items())
    lines = [
        "# Benchmark",
        "",
        "Written by `bench/compare.py`; the numbers are in [benchmark.json](benchmark.json).",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), "
        f"{machine['threads']} threads, {machine['system']}, Python {machine['python']}; {versions}; {machine['date']}.",
        "",
        "Each tool runs its own training loop in a process of its own, on the same rows, from the same weights, in fp32, "
        "with fused AdamW, a constant learning rate, clipping at 1 and a log line each step. One step of each in turn; "
        "ratios are medians over the rounds, with their quartiles in brackets. Tokens are real ones, without padding. A "
        "packed step has one forward of up to the given number of tokens, a padded one as many rows as have about that "
        "number. Memory is the peak of the process less what it takes after its imports. The first step is counted from "
        "the start of the process: imports, preparation of the data, and the step; the part of importing torch and "
        "transformers is in brackets.",
        "",
        "The limit is the time of the matrix products that a step must make, at the rate this machine reaches on the same "
        "shapes, measured in turn with the steps: 6 FLOP for each weight and token (4 for frozen weights), the head on "
        "supervised tokens alone, attention within documents.",
        "",
    ]
    for case in found.get("steps", {}).values():
        lines += _case_lines(case)
    lines += _goal_lines(found)
    lines += _profile_lines(found.get("profile", {}))
    lines += _preparation_lines(found.get("prepare", []))
    lines += _first_step_lines(found.get("first_step", {}))
    lines += _memory_lines(found.get("memory", {}))
    if len(found.get("lengths", [])) > 1:
        lines += ["## Length of the documents", "", "26M parameters, all weights, 8,192 tokens a step.", "",
                  "![Tokens per second against the length of the documents](benchmark_lengths.svg)", ""]  # fmt: skip
    if len(found.get("sizes", [])) > 1:
        lines += ["## Size of the model", "", "All weights, 2,048 tokens a step (1,024 for the largest).", "",
                  "![Tokens per second against the number of parameters](benchmark_sizes.svg)", ""]  # fmt: skip
    lines += _difference_lines(found)
    if failed := found.get("failed"):
        lines += ["", "## Not measured", "", *(f"- {name}: {_escape(why)}" for name, why in failed.items())]
    return lines


def _escape(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def summary_of(found: dict[str, Any]) -> list[str]:
    """One line a comparison, for the README."""
    lines = []
    for name, case in found.get("steps", {}).items():
        engines = case["engines"]
        words = [
            f"{_ratio(one['ours_over_it'])}x {NAMES[engine]}" for engine, one in engines.items() if engine != "ours"
        ]
        if "share_of_limit" in engines.get("ours", {}):
            words.append(f"{engines['ours']['share_of_limit']['median']:.0%} of the limit")
        if "trl-packed" in engines:
            share = engines["ours"]["peak_mb"] / engines["trl-packed"]["peak_mb"]
            words.append(f"{share:.2f} of the memory of {NAMES['trl-packed']}")
        lines.append(f"{name}: {', '.join(words)}")
    for row in found.get("prepare", []):
        if "ours_over_prepare-trl" in row:
            lines.append(f"preparation, {_processes(row['workers'])}: {_ratio(row['ours_over_prepare-trl'])}x TRL")
    for words, goal, value, is_met in find_goals(found):
        lines.append(f"goal: {words}: {value:.2f}, asked {goal:g}, {'met' if is_met else 'missed'}")
    return lines


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"


def _case_lines(case: dict[str, Any]) -> list[str]:
    what = "all weights" if case["method"] == "full" else "LoRA, rank 16, all linear layers"
    rate = f"; matrix products at {case['gflops_per_s']['median']:,.0f} GFLOP/s" if "gflops_per_s" in case else ""
    rounds = f"{case['rounds']} round{'s' if case['rounds'] != 1 else ''}"
    lines = [
        f"## {case['shape']}: {what}",
        "",
        f"{case['parameters'] / 1e6:,.0f}M parameters, up to {case['tokens']:,} tokens a step, {rounds}{rate}.",
        "",
        "| | tokens/s | tunesmith over it | share of the limit | peak memory | first step after | tokens a step, "
        "supervised |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, one in case["engines"].items():
        ratio = "" if name == "ours" else f"{_ratio(one['ours_over_it'])}x"
        share = f"{one['share_of_limit']['median']:.0%}" if "share_of_limit" in one else ""
        lines.append(
            f"| {NAMES[name]} | {one['tokens_per_s']['median']:,.0f} | {ratio} | "
            f"{share} | {one['peak_mb']:,.0f} MB | "
            f"{one['first_step_s']:.1f} s ({one['imports_s']:.1f}) | "
            f"{one['tokens_per_step']:,.0f}, {one['targets_per_step']:,.0f} |"
        )
    for name, why in case.get("failed", {}).items():
        lines.append(f"| {NAMES[name]} | failed: {_escape(why)} | | | | | |")
    return [*lines, ""]


def find_goals(found: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Words, goal, measured value, whether it is met; goals that were not measured are left out."""
    goals = []
    for case, engine, what, goal, words in GOALS:
        engines = found.get("steps", {}).get(case, {}).get("engines", {})
        if engine not in engines or what not in engines[engine]:
            continue
        if what == "peak_mb":
            value = engines["ours"][what] / engines[engine][what]
            goals.append((words, goal, value, value <= goal))
        else:
            value = engines[engine][what]["median"]
            goals.append((words, goal, value, value >= goal))
    prepared = [row for row in found.get("prepare", []) if "ours_over_prepare-trl" in row]
    if prepared:
        ours, trl = (max(row[name]["median"] for row in prepared) for name in ("prepare-ours", "prepare-trl"))
        goals.append(("rows/s over TRL's, each with its faster number of processes", 4.0, ours / trl, ours / trl >= 4))
    if first := found.get("first_step"):
        rest = first["after_imports_s"]
        goals.append(
            ("seconds to the first step, at most, beyond importing torch and transformers", 5.0, rest, rest <= 5)
        )
    if memory := found.get("memory"):
        worst = max(abs(case["error"]) for case in memory.values())
        goals.append(("largest error of the memory that is announced", 0.15, worst, worst <= 0.15))
    return goals


def _goal_lines(found: dict[str, Any]) -> list[str]:
    goals = find_goals(found)
    if not goals:
        return []
    lines = ["## Goals", "", "| goal | asked | measured | |", "|---|--:|--:|---|"]
    for words, goal, value, is_met in goals:
        is_most = "memory" in words or "at most" in words
        sign = "<=" if is_most else ">="
        missed = f"missed by {abs(value / goal - 1):.0%}"
        lines.append(f"| {words} | {sign} {goal:g} | {value:.2f} | {'met' if is_met else missed} |")
    return [*lines, ""]


def _preparation_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not any("prepare-ours" in row for row in rows):
        return []
    rows = [row for row in rows if "prepare-ours" in row]
    lines = [
        "## Preparation of the data",
        "",
        f"{rows[0]['rows']:,} rows of one turn, rendered, encoded and labelled; tunesmith proves every label, reads the "
        "file and writes the token store; TRL's rows are in memory already.",
        "",
        "| processes | tunesmith, rows/s | TRL, rows/s | ratio |",
        "|--:|--:|--:|--:|",
    ]
    for row in rows:
        trl = row.get("prepare-trl")
        ratio = f"{_ratio(row['ours_over_prepare-trl'])}x" if trl else ""
        lines.append(
            f"| {row['workers']} | {row['prepare-ours']['median']:,.0f} | "
            f"{format(trl['median'], ',.0f') if trl else ''} | {ratio} |"
        )
    return [
        *lines,
        "",
        "How preparation grows with the number of rows: [large_data.md](large_data.md).",
        "",
    ]


def _profile_lines(found: dict[str, dict[str, float]]) -> list[str]:
    if not found:
        return []
    lines = [
        "## What a step spends its time on",
        "",
        "`bench/profile_step.py`: tunesmith, 26M parameters, fp32; shares of the time of all operations. The limit counts the "
        "products and the FLOP of attention; torch's kernel for attention on CPUs reaches fewer FLOP/s than products do, and "
        "all else is memory that is read and written.",
        "",
        f"| | {' | '.join(found)} |",
        f"|---|{'--:|' * len(found)}",
    ]
    for kind in next(iter(found.values())):
        lines.append(f"| {kind} | {' | '.join(f'{shares.get(kind, 0):.0%}' for shares in found.values())} |")
    return [*lines, ""]


def _first_step_lines(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    return [
        "## The first step",
        "",
        f"`bench/first_step.py`: 26M parameters, {found['rows']:,} rows, warm file cache, medians of {found['rounds']} "
        f"rounds. The first output comes after {found['first_output_s']:.1f} s, step 1 after {found['first_step_s']:.1f} s; "
        f"importing torch and transformers alone takes {found['imports_s']:.1f} s, with a model's class "
        f"{found['model_code_s']:.1f} s.",
        "",
    ]


def _memory_lines(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    lines = [
        "## Memory, announced and measured",
        "",
        "`bench/memory.py`: the line `memory` before step 1 against the peak of the process in three steps with "
        "checkpoints; 2,048 tokens a forward, fp32 and all weights where nothing else is said.",
        "",
        "| run | announced | measured | error |",
        "|---|--:|--:|--:|",
    ]
    for name, case in found.items():
        announced, measured = (f"{case[key] / 1e6:,.0f} MB" for key in ("announced", "measured"))
        lines.append(f"| {name} | {announced} | {measured} | {case['error']:+.0%} |")
    return [*lines, ""]


def _difference_lines(found: dict[str, Any]) -> list[str]:
    lines = ["## What differs between the tools", ""]
    for name, case in found.get("steps", {}).items():
        data = {engine: one["data"] for engine, one in case["engines"].items() if one["data"]}
        if not data:
            continue
        counts = "; ".join(
            f"{NAMES[engine]} {rows:,} rows, {tokens:,} tokens, {targets:,} supervised"
            for engine, (rows, tokens, targets) in data.items()
        )
        lines.append(f"- {name}: {counts}.")
    lines += [
        "- TRL trains on the newline after the stop token, tunesmith does not; each packs in its own order, so a step of "
        "one has a few tokens more than one of the other, which tokens/s accounts for.",
        "- Threads are the same, and so is the precision, but for the row with auto (bf16 where the CPU has instructions "
        "for it). TRL checkpoints activations by default; that is switched off here. "
        "Its default loss computes the head on supervised tokens alone.",
        "- MiniMind's trainer pads every row to 768 tokens (its default), adds a system prompt to a fifth of the rows, and "
        "has its own learning rate schedule; the model is of its class, saved for tunesmith in transformers' form.",
        "- TRL and transformers are faster with padding-free attention on a GPU (flash-attn); here all run on a CPU.",
    ]
    return lines


def plot(rows: list[dict[str, Any]], key: str) -> str:
    """Tokens per second, and memory below, over a logarithmic axis."""
    width, height, left, gap = 640, 200, 70, 70
    low, high = log10(rows[0][key]), log10(rows[-1][key])
    engines = [name for name in ("ours", "trl-packed") if any(name in row for row in rows)]

    def across(value: float) -> float:
        return left + (log10(value) - low) / (high - low or 1) * (width - left - 40)

    parts = []
    for place, (what, title) in enumerate((("tokens_per_s", "tokens per second"), ("peak_mb", "peak memory, MB"))):
        top = 30 + place * (height + gap)
        values = {name: [(row[key], _number(row[name][what])) for row in rows if name in row] for name in engines}
        lowest, most = (choose(value for one in values.values() for _, value in one) for choose in (min, max))
        is_log = most > 20 * lowest
        scale = ", logarithmic" if is_log else ""
        parts.append(f'<text x="{left}" y="{top - 10}" class="title">{title}{scale}</text>')
        parts.append(f'<path d="M{left},{top} V{top + height} H{width - 20}" class="axis"/>')
        for row in rows:
            parts.append(
                f'<text x="{across(row[key]):.0f}" y="{top + height + 18}" class="mid">{_short(row[key])}</text>'
            )
        for name in engines:
            points = [
                (across(at), top + height * (1 - _share(value, lowest, most, is_log)), value)
                for at, value in values[name]
            ]
            parts.append(
                f'<polyline points="{" ".join(f"{x:.0f},{y:.0f}" for x, y, _ in points)}" class="line {name}"/>'
            )
            above = name == "ours" if what == "tokens_per_s" else name != "ours"
            for x, y, value in points:
                parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3.5" class="{name}"/>')
                parts.append(f'<text x="{x:.0f}" y="{y - 9 if above else y + 18:.0f}" class="mid">{value:,.0f}</text>')
        if len(engines) > 1:
            for number, name in enumerate(engines):
                parts.append(
                    f'<text x="{width - 190 + 95 * number}" y="{top - 10}" class="name {name}">{NAMES[name]}</text>'
                )
    style = (
        "text{font:12px sans-serif;fill:#333}.title{font-weight:bold}.mid{text-anchor:middle}"
        ".axis{stroke:#999;fill:none}.line{stroke-width:2;fill:none}"
        ".line.ours{stroke:#2563a8}circle.ours,text.ours{fill:#2563a8}"
        ".line.trl-packed{stroke:#b4541a}circle.trl-packed,text.trl-packed{fill:#b4541a}"
    )
    label = "the length of the documents" if key == "length" else "the number of parameters"
    below = "tokens of a document" if key == "length" else "parameters"
    parts.append(f'<text x="{width - 20}" y="{2 * (height + gap)}" text-anchor="end">{below}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * (height + gap) + 10}" role="img" '
        f'aria-label="Tokens per second and peak memory against {label}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _number(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


def _share(value: float, lowest: float, most: float, is_log: bool) -> float:
    if is_log:
        return 0.08 + 0.8 * (log10(value) - log10(lowest)) / (log10(most) - log10(lowest) or 1)
    return value / (most * 1.15)


def _short(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 10 * size or (value >= size and unit == "M"):
            return f"{value / size:,.0f}{unit}"
    return f"{value:,.0f}"
