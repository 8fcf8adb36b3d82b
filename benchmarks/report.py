"""Write docs/families.md and the tables of other pages from the JSON in benchmarks/results.

    python -m benchmarks.report [--check]

`--check` writes nothing and fails if a page does not say what the JSON says.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
README = Path(__file__).parents[1] / "README.md"
NUMERICS = PAGE.with_name("numerics.md")
FAMILIES = PAGE.with_name("families.md")
SERVING = PAGE.with_name("serving.md")
CHOOSING = PAGE.with_name("choosing.md")
EVALUATION = PAGE.with_name("evaluation.md")
RELIABILITY = PAGE.with_name("reliability.md")
README_METHODS = ("none", "truncated", "linear", "ntk, alpha 2", "ntk, alpha 4", "dynamic_ntk", "yarn")
END = "<!-- end -->"
NEVER = {"foreign": "errors that are not ours", "failed": "tracebacks or other codes"}
_NO_FIGURES = ("what", "tried", "minutes", "commit")


def load(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return result


def environment(result: dict[str, Any]) -> str:
    stamp = result["environment"]
    versions = ", ".join(f"{name} {stamp[name]}" for name in ("python", "torch", "transformers", "ropex"))
    where = stamp.get("gpu") or f"{stamp['cpu']}, {stamp['threads']} threads"
    return f"{where}; {stamp['dtype']}; {versions}; commit {(stamp['commit'] or 'none')[:12]}; {stamp['date'][:10]}."


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(summary: dict[str, float], digits: int) -> str:
    """Median and quartiles, as the tables show them."""
    median, low, high = (f"{summary[name]:.{digits}f}" for name in ("median", "quartile_1", "quartile_3"))
    return f"{median} ({low}-{high})"


def perplexity_rows(result: dict[str, Any], methods: list[str]) -> str:
    measured = result["perplexity"]
    rows = [
        [f"{start:,}-{end:,}", *(f"{measured['results'][m]['perplexity'][i]:.2f}" for m in methods)]
        for i, (start, end) in enumerate(measured["bins"])
    ]
    return table(["positions", *methods], rows)


def perplexity_table() -> str:
    """A choice of the methods, for the README."""
    return perplexity_rows(load("perplexity.json"), list(README_METHODS))


def perplexity() -> str:
    parts = []
    for name in ("perplexity.json", "perplexity_1.5.json"):
        result = load(name)
        measured = result["perplexity"]
        methods = list(measured["results"])
        gains = [f"{measured['results'][m]['gain'][-1][0]:+.3f}" for m in methods]
        option = "" if result["factor"] == 2 else f" --factor {result['factor']:g}"
        parts.append(
            f"""Factor {result["factor"]:g}:

{perplexity_rows(result, methods)}
| last row, gain over truncated (nats) | {" | ".join(gains)} |

![perplexity against position](../benchmarks/results/{name.replace(".json", ".png")})

`python -m benchmarks.perplexity{option}` ([JSON](../benchmarks/results/{name})). {environment(result)}
"""
        )
    result = load("perplexity.json")
    measured = result["perplexity"]
    return f"""## Perplexity against position

{result["model"]}, trained at {result["trained_length"]:,} tokens, on {len(measured["documents"])} document of
`{measured["text"]}`; protocol `{measured["protocol"]}`. No method was trained. `truncated` is the unpatched model
that sees the last {result["trained_length"]:,} tokens only: what does not fall below it gains nothing from the added
context, as far as perplexity tells. Methods that depend on the length are run once for each row.

{chr(10).join(parts)}"""


def parity() -> str:
    result = load("parity.json")
    largest = ", ".join(f"{method} {difference:.1e}" for method, difference in result["differences"].items())
    return f"""## Beside transformers' own methods

The same model, {result["tokens"]:,} tokens, factor 2: the largest relative difference between ropex and transformers in
the perplexity of any bin is {largest}.

`python -m benchmarks.parity` ([JSON](../benchmarks/results/parity.json)). {environment(result)}
"""


def retrieval_row(part: dict[str, Any], method: str, length: int) -> list[str]:
    """For each task the mean log-probability of the answer, and the share that greedy decoding gives."""
    cells = []
    for task, measured in part["tasks"].items():
        records = [record for record in measured["results"][task][method] if record["length"] == length]
        logprob, exact = (sum(record[key] for record in records) / len(records) for key in ("logprob", "exact"))
        cells.append(f"{logprob:.1f} ({100 * exact:.0f} %)")
    return cells


def retrieval_table(factor: str) -> str:
    """Methods by tasks; in the first row the unpatched model at its trained length."""
    result = load("retrieval.json")
    within, part = result["parts"]["within"], result["parts"][factor]
    trained, length = within["lengths"][-1], part["lengths"][-1]
    task, measured = next(iter(part["tasks"].items()))
    methods = list(measured["results"][task])
    rows = [[f"none, at {trained:,} tokens", *retrieval_row(within, "none", trained)]]
    rows += [[method, *retrieval_row(part, method, length)] for method in methods]
    return table([f"at {length:,} tokens", *part["tasks"]], rows)


def retrieval() -> str:
    result = load("retrieval.json")
    parts = {factor: part for factor, part in result["parts"].items() if factor != "within"}
    same = ", ".join(
        f"{name} is {other} at factor {factor}"
        for factor, part in parts.items()
        for name, other in part["same"].items()
    )
    first = next(iter(parts.values()))
    asked = ", ".join(f"{len(measured['depths'])} of `{task}`" for task, measured in first["tasks"].items())
    samples = next(iter(first["tasks"].values()))["samples"]
    tables = "\n\n".join(f"Factor {factor}:\n\n{retrieval_table(factor)}" for factor in parts)
    return f"""## Retrieval

{result["model"]}. Mean log-probability of the answer in nats, and the share of answers that greedy decoding gives word
for word; texts of each length: {samples}, with these questions: {asked}. An answer of five digits drawn at random
would have -11.5. {same}.

{tables}

`python -m benchmarks.retrieval` ([JSON](../benchmarks/results/retrieval.json)). {environment(result)}
"""


def protocols() -> str:
    result = load("protocols.json")
    names = list(result["results"])
    ends = [end for _, end in result["results"]["binned"]["bins"]]
    rows = [
        [f"{end:,}", *(f"{result['results'][name]['perplexity'][i]:.2f}" for name in names)]
        for i, end in enumerate(ends)
    ]
    rows.append(["tokens read", *(f"{result['results'][name]['processed']:,}" for name in names)])
    first = result["results"]["press"]["seconds"]
    rows.append(["time / press", *(f"{result['results'][name]['seconds'] / first:.3f}" for name in names)])
    return f"""{result["model"]}, not patched, one document of {result["tokens"]:,} tokens,
stride {result["stride"]:,}; a row is a length, of `binned` the bin that ends there:

{table(["up to", *names], rows)}

At its peak `binned` over {result["memory"]["tokens"]:,} tokens adds {result["memory"]["mib"]:,} MiB to the loaded
model.

`python -m benchmarks.protocols` ([JSON](../benchmarks/results/protocols.json)). {environment(result)}
"""


def patch_overhead() -> str:
    rows, stamps = [], []
    for name in ("patch_overhead_cpu_float32.json", "patch_overhead_cpu_bfloat16.json"):
        result = load(name)
        stamps.append(f"[{name}](../benchmarks/results/{name}): {environment(result)}")
        for clock in ("wall", "cpu"):
            ratios = (result["patched"][clock], result["unpatched"][clock])
            cells = [spread(ratio, 3) for ratio in ratios]
            rows.append([result["environment"]["dtype"], str(result["tokens"]), str(result["pairs"]), clock, *cells])
    return f"""## What a patch costs

Time of a forward pass of the default model over that of the unpatched one in the same process, interleaved: median and
quartiles, of wall-clock and of processor time. The last column, unpatched over unpatched, is the machine's noise.

{table(["dtype", "tokens", "pairs", "clock", "patched / unpatched", "unpatched / unpatched"], rows)}

`python -m benchmarks.patch_overhead [--dtype bfloat16]`. {" ".join(stamps)}
"""


def angles_table() -> str:
    result = load("precision.json")
    rows = [
        [
            f"{row['base']:g}",
            f"{row['length']:,}",
            *(f"{row[kind][error]:.1e}" for kind in ("exact", "float32") for error in ("largest", "rms")),
        ]
        for row in result["angles"]
    ]
    header = ["base", "just below", "exact, largest", "rms", "float32, largest", "rms"]
    return f"""Errors of cos and sin against 200-bit arithmetic; rotary dimension 128, the model's float32 frequencies
taken as exact:

{table(header, rows)}
"""


def ladder_table() -> str:
    result = load("precision.json")
    found = {(row["base"], row["rung"], row["shift"]): row["rms"] for row in result["ladder"]}
    bases, rungs, shifts = (list(dict.fromkeys(key[axis] for key in found)) for axis in range(3))
    rows = [
        [f"{base:g}", rung, *(f"{found[base, rung, shift]:.1e}" for shift in shifts)]
        for base in bases
        for rung in rungs
    ]
    return f"""Root mean square of the change of logits; q and k of unit variance with 128 channels,
{result["pairs"]:,} pairs at distances below {result["reach"]:,}, moved by

{table(["base", "rung", *(f"{shift:,}" for shift in shifts)], rows)}

`bfloat16 arithmetic` is what transformers does in a bfloat16 model. The others have exact angles and float32
arithmetic, and are named by what q and k are kept in.
"""


def model_table() -> str:
    result = load("precision.json")
    found = result["model"]
    rows = [[row["rung"], f"{row['d']:.4f}", f"{row['d_logit']:.2e}"] for row in found["rungs"]]
    return f"""{found["model"]}, {found["tokens"]} tokens moved by {found["shift"]}; each of {found["layers"]} layers
with its own q and k:

{table(["rung", "D", "D_logit"], rows)}

`python -m benchmarks.precision` ([JSON](../benchmarks/results/precision.json)). {environment(result)}
"""


def precision_patch() -> str:
    result = load("precision_patch.json")
    rows = [
        [f"`{name}`" if "=" in name else name, f"{row['d']:.4f}", f"{row['d_logit']:.2e}", spread(row["time"], 2)]
        + [str(row["memory_mib"])]
        for name, row in result["rows"].items()
    ]
    return f"""{result["model"]}, {result["tokens"]} tokens moved by {result["shift"]}. Time of a forward pass over the
unpatched model's: median and quartiles of {result["pairs"]} pairs; memory: what a pass over
{result["memory_tokens"]} tokens adds at its peak.

{table(["patch", "D", "D_logit", "time", "MiB"], rows)}

`python -m benchmarks.precision_patch` ([JSON](../benchmarks/results/precision_patch.json)). {environment(result)}
"""


def families_page() -> str:
    result = load("families.json")
    found: dict[str, dict[str, Any]] = {"works": {}, "refused": {}, "not built": {}}
    for family, each in result["families"].items():
        found[each["status"]][family] = each
    works = [
        [
            f"`{name}`",
            each["layout"].replace("/", ", "),
            str(each["rotary_dim"]),
            family_layers(each),
            family_note(each),
        ]
        for name, each in found["works"].items()
    ]
    others = {
        status: [[f"`{name}`", each["reason"].replace("|", "/")] for name, each in found[status].items()]
        for status in ("refused", "not built")
    }
    none, float32 = (max(each[key] for each in found["works"].values()) for key in ("none", "none_float32"))
    yarn = [each["yarn"] for each in found["works"].values() if each.get("yarn") is not None and not each["softmax"]]
    return f"""# Families

Made from the JSON in `benchmarks/results` by `python -m benchmarks.report`.

Tiny random models of every family that transformers {result["environment"]["transformers"]} has a causal language
model for, alone or beside images, and of encoders that rotate; `tests/families.py` builds them and
`tests/test_families.py` holds them to this grid. Every type is a `config.model_type`.

**{len(works)} work.** With `none` the largest change of any logit is {none:.0e}, and
{float32:.0e} with `angles="float32"` (0 but for complex tables, whose product rounds in another order). `yarn`
differs from transformers' own by at most {max(yarn):.0e} on the {len(yarn)} that have one. Another instance was
untouched, and removal exact, on all.

{table(["type", "tables, channels", "rotary dimension here", "layers that rotate here", "note"], works)}

**{len(others["refused"])} are refused**, with what the error says:

{table(["type", "reason"], others["refused"])}

**{len(others["not built"])} could not be built or run small**, and are not tested:

{table(["type", "why"], others["not built"])}

`python -m benchmarks.families` ([JSON](../benchmarks/results/families.json)). {environment(result)}
"""


def engines_table() -> str:
    result = load("engines.json")
    rows = [
        [
            f"`{name}`",
            f"`{row['rope_type']}`",
            *(served(row[engine][how]) for engine in result["engines"] for how in ("export", "save_pretrained")),
        ]
        for name, row in result["methods"].items()
    ]
    header = ["method", "exported as"]
    for engine, version in result["engines"].items():
        header += [f"{engine} {version}, export", f"{engine}, saved"]
    return f"""{table(header, rows)}

[JSON](../benchmarks/results/engines.json). {environment(result)}
"""


def served(error: float | str) -> str:
    """What an engine makes of a config: its error, or why it is not the patch."""
    if isinstance(error, str):
        return f"no: {error}"
    return f"{error:.0e}" if error < 1e-3 else f"**no**, off by {error:.2f}"


def llama_cpp_table() -> str:
    result = load("llama_cpp.json")
    rows = [[f"`{name}`", f"{row['error']:.0e}", f"{row['effect']:.1f}"] for name, row in result["methods"].items()]
    return f"""{table(["method", "largest difference of a logit", "what the method itself moves it by"], rows)}

llama-cpp-python {result["llama_cpp_python"]}. [JSON](../benchmarks/results/llama_cpp.json). {environment(result)}
"""


def family_layers(each: dict[str, Any]) -> str:
    return ", ".join(
        f"{count} {name.replace('_attention', '')}{f' (window {window})' if window else ''}"
        for name, count, window in each["layers"]
    )


def family_note(each: dict[str, Any]) -> str:
    notes = []
    if each.get("softmax"):
        notes.append("amplitude in the softmax scale")
    if each["written"] is None and not each.get("softmax"):
        notes.append("the config cannot say it")
    elif each["written"] not in (None, "yarn"):
        notes.append(f"written as {each['written']}")
    return "; ".join(notes)


def versions_table() -> str:
    result = load("versions.json")
    counts = ("passed", "failed", "skipped")
    rows = [[name, *(str(each.get(count, 0)) for count in counts), each["torch"]] for name, each in result.items()]
    return table(["transformers", *counts, "torch"], rows)


def speed() -> str:
    found = [load(path.name) for path in sorted(RESULTS.glob("speed_*.json"))]
    return "\n".join(speed_on(result) for result in found)


def speed_on(result: dict[str, Any]) -> str:
    device = result["environment"]["device"]
    names = list(dict.fromkeys(row["contender"] for row in result["rows"] if row["contender"] != "copy"))
    places = list(
        dict.fromkeys(
            (row["dtype"], row["layout"], row["backward"], row["batch"], row["tokens"]) for row in result["rows"]
        )
    )
    cells = {
        (row["contender"], row["dtype"], row["layout"], row["backward"], row["batch"], row["tokens"]): row
        for row in result["rows"]
    }
    rows = []
    for place in sorted(places, key=lambda place: place[:3]):
        dtype, layout, backward, batch, tokens = place
        line = [
            dtype,
            layout,
            "backward" if backward else "forward",
            f"{batch} x {tokens:,}" if batch > 1 else f"{tokens:,}",
        ]
        rows.append([*line, *(speed_cell(cells.get((name, *place))) for name in names)])
    rounds = "" if device == "cuda" else f" of {result['rounds']} rounds, in which all take turns"
    clock = "in microseconds, the L2 cache flushed, and over" if device == "cuda" else "over"
    return f"""### On {result["environment"].get("gpu") or "a CPU"}

Time {clock} that of a copy of the same bytes, q with {result["q_heads"]} heads and k with {result["k_heads"]} of
{result["head_dim"]} channels: medians{rounds}. Each was right before it was timed. "angles inside" makes cos and sin in
each call, "table" is given them in float32, as a model's layers are; "with the frequencies' gradient" is the backward
pass that also gives d inv_freq.

{table(["dtype", "layout", "pass", "tokens", *names], rows)}

![time over a copy](../benchmarks/results/speed_{device}.png)

`python -m benchmarks.speed --device {device}` ([JSON](../benchmarks/results/speed_{device}.json)); allocator
`{result["environment"]["allocator"]}`. {environment(result)}
"""


def speed_cell(row: dict[str, Any] | None) -> str:
    if row is None or "over_copy" not in row:
        return "" if row is None else "wrong" if "wrong" in row else "fails"
    if isinstance(row["over_copy"], dict):
        return f"{row['over_copy']['median']:.2f}"
    return f"{1e6 * row['seconds']['median']:.1f} ({row['over_copy']:.2f})"


def clex_cost() -> str:
    result = load("clex_cost.json")
    rows = [
        [
            row["solver"],
            f"{row['step']:g}",
            str(row["evaluations"]),
            f"{row['relative_error']:.1e}",
            spread(row["time_over_ropex"], 1),
        ]
        for row in result["solvers"]
    ]
    share = result["training"]["share"]
    return f"""## What CLEX costs

Its frequencies at t = {result["max_factor"]}, forward and backward: evaluations of the net, largest relative error
against a fine solution in float64, and time over that of ropex's default in the same process, median and quartiles of
{result["rounds"]} rounds. `released` solves the whole equation in float32 with torchdiffeq's `rk4`, in steps of 0.01 as
in the released code; ropex integrates the net's part around the closed-form drift, in float64.

{table(["solver", "step", "evaluations", "relative error", "time / ropex at 0.5"], rows)}

In a training step of {result["training"]["model"]} on {result["training"]["tokens"]} tokens, the default takes
{100 * share["median"]:.2f} % ({100 * share["quartile_1"]:.2f}-{100 * share["quartile_3"]:.2f}) of the time.

`python -m benchmarks.clex_cost` ([JSON](../benchmarks/results/clex_cost.json)). {environment(result)}
"""


def reliability() -> str:
    result = load("reliability.json")
    names = ("lost", "half patched", "left behind", "crashed", "failed", "foreign")
    rows = []
    for each in result["experiments"].values():
        never = [f"{each[name]} {NEVER.get(name, name)}" for name in names if name in each]
        others = [f"{name} {value}" for name, value in each.items() if name not in {*names, *_NO_FIGURES}]
        rows.append([each["what"], f"{each['tried']:,}", ", ".join(never), ", ".join(others)])
    digest = result["digest"]
    return f"""{table(["what", "tried", "what should never happen", "besides"], rows)}

The digest of all weights, once per run, takes as long as {digest["forward passes of 512 tokens"]} forward passes
over 512 tokens, of {digest["model"]} ({digest["bytes"] / 1e6:.0f} MB) on one thread.

`make chaos` ([JSON](../benchmarks/results/reliability.json)). {environment(result)}"""


def page() -> str:
    head = "# Results\n\nMade from the JSON in `benchmarks/results` by `python -m benchmarks.report`.\n"
    rotation = "## What a rotation costs\n\n" + speed()
    return "\n".join((head, perplexity(), retrieval(), parity(), rotation, patch_overhead(), clex_cost()))


def filled(path: Path, **tables: str) -> str:
    """A page with its tables, each between the marker that names it and the next end."""
    text = path.read_text(encoding="utf-8")
    for name, content in tables.items():
        start = f"<!-- {name}, by benchmarks/report.py -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(END)
        text = f"{before}{start}\n{content}\n{END}{after}"
    return text


def pages() -> dict[Path, str]:
    """What the pages with results must say."""
    return {
        PAGE: page(),
        README: filled(
            README, perplexity=perplexity_table(), retrieval=retrieval_table("2"), versions=versions_table()
        ),
        CHOOSING: filled(CHOOSING, retrieval=retrieval_table("2")),
        EVALUATION: filled(EVALUATION, protocols=protocols()),
        NUMERICS: filled(
            NUMERICS,
            angles=angles_table(),
            ladder=ladder_table(),
            model=model_table(),
            precision_patch=precision_patch(),
        ),
        FAMILIES: families_page(),
        RELIABILITY: filled(RELIABILITY, reliability=reliability()),
        SERVING: filled(SERVING, engines=engines_table(), llama_cpp=llama_cpp_table()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in pages().items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.name} does not say what the JSON says; run `python -m benchmarks.report`")


if __name__ == "__main__":
    main()
