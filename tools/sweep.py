"""Run the tests of the patch against several versions of transformers, each in an environment of its own.

    python tools/sweep.py [--versions 4.57.6 5.5.0 5.14.1 latest] [--environments DIR]

Writes benchmarks/results/versions.json, which README states. An environment that exists is used again.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "versions.json"
VERSIONS = ["4.57.6", "5.5.0", "5.14.1", "latest"]
TESTS = ["patch", "patch_errors", "bad_patches", "families", "generation", "lifecycle", "export", "training"]
TESTS += ["transactions", "saved", "security"]


def environment(directory: Path, version: str) -> Path:
    """The Python of an environment with this version of transformers."""
    python = directory / version / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory / version], check=True)
        wanted = "transformers" if version == "latest" else f"transformers=={version}"
        install = [python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[dev]", wanted]
        subprocess.run(install, check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS)
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "ropex-sweep")
    options = parser.parse_args()
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for version in options.versions:
        python = environment(options.environments, version)
        asked = "import transformers, torch; print(transformers.__version__, torch.__version__)"
        name, torch = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.split()
        files = [f"tests/test_{test}.py" for test in TESTS]
        start = time.perf_counter()
        run = subprocess.run(
            [python, "-m", "pytest", "-q", "--no-header", *files], cwd=ROOT, capture_output=True, text=True, check=False
        )
        summary = run.stdout.strip().splitlines()[-1]
        counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, flags=re.MULTILINE)
        took = round(time.perf_counter() - start)
        results[name] = {**counts, "failures": failed, "torch": torch, "seconds": took}
        print(f"transformers {name}: {summary}")
        for each in failed:
            print(f"  {each}")
        ordered = dict(sorted(results.items(), key=lambda item: [int(part) for part in item[0].split(".")[:3]]))
        RESULT.write_text(json.dumps(ordered, indent=2) + "\n", encoding="utf-8")
    if any(result.get("failed") or result.get("error") for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
