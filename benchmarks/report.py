"""Write the tables of docs/results.md and README.md from the JSON in benchmarks/results.

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
START, END = "<!-- perplexity, by benchmarks/report.py -->", "<!-- end -->"


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


def perplexity_table() -> str:
    result = load("perplexity.json")
    methods = list(result["differences"])
    rows = [
        [f"{start}-{end}", *(f"{result['results'][m]['perplexity'][i]:.2f}" for m in methods)]
        for i, (start, end) in enumerate(result["bins"])
    ]
    return table(["positions", *methods], rows)


def perplexity() -> str:
    result = load("perplexity.json")
    largest = ", ".join(f"{method} {difference:.1e}" for method, difference in result["differences"].items())
    trained = result["results"]["transformers yarn"]["rope_parameters"]["original_max_position_embeddings"]
    return f"""## Perplexity against position

{result["model"]}, trained at {trained} tokens; {result["tokens"]} tokens of `{result["text"]}`;
protocol `{result["protocol"]}`: one pass per method, mean over the tokens of each bin. Factor 2 where the method takes
one. No method was trained. There is no row yet for the unpatched model that sees the last {trained} tokens only, which
a gain must be held against: perplexity alone does not show that added context is used.

{perplexity_table()}

![perplexity against position](../benchmarks/results/perplexity.png)

The same methods by transformers' own implementation, on the same tokens: the largest relative difference in the
perplexity of any bin is {largest}.

`python -m benchmarks.perplexity` ([JSON](../benchmarks/results/perplexity.json)). {environment(result)}
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


def angles() -> str:
    result = load("angles.json")
    rows = [
        [
            f"{row['base']:g}",
            f"{row['length']:,}",
            *(f"{row['largest_error'][kind]:.1e}" for kind in ("exact", "float32")),
        ]
        for row in result["rows"]
    ]
    return f"""## Angles

Largest absolute error of cos and sin just below a length, against 200-bit arithmetic; rotary dimension 128, the model's
float32 frequencies taken as exact. `exact` is what a patch uses, `float32` is transformers' arithmetic.

{table(["base", "length", "exact", "float32"], rows)}

`python -m benchmarks.angles` ([JSON](../benchmarks/results/angles.json)). {environment(result)}
"""


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


def page() -> str:
    head = "# Results\n\nMade from the JSON in `benchmarks/results` by `python -m benchmarks.report`.\n"
    return "\n".join((head, perplexity(), angles(), patch_overhead(), clex_cost()))


def readme() -> str:
    """The README with the perplexity table between its two markers."""
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{perplexity_table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in ((PAGE, page()), (README, readme())):
        if not check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path.name} does not say what the JSON says; run `python -m benchmarks.report`")


if __name__ == "__main__":
    main()
