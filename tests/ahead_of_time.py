"""Compile the Triton kernels ahead of time, without a GPU, and print what the compiler made of them as JSON.

    python -m tests.ahead_of_time

Run in a process of its own: Triton's interpreter, which the tests use, must be off.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ropex.kernels import triton_kernels
from ropex.kernels.triton_launch import default_launch, widest_tile

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# The shapes of Llama-3 8B, with strides of a [batch, seq, heads, head_dim] memory.
HALF, HEADS = 64, 40
PLAIN = {"TABLE": False, "PER_TOKEN": False, "AMPLITUDE": False, "INTERLEAVED": False}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "forward": (triton_kernels.rotate_kernel, {**PLAIN, "CONJUGATE": False, "SPLIT": False}),
    "backward": (triton_kernels.rotate_kernel, {**PLAIN, "CONJUGATE": True, "SPLIT": False}),
    "interleaved": (triton_kernels.rotate_kernel, {**PLAIN, "INTERLEAVED": True, "CONJUGATE": False, "SPLIT": False}),
    "table": (triton_kernels.rotate_kernel, {**PLAIN, "TABLE": True, "CONJUGATE": False, "SPLIT": False}),
    "per_token": (triton_kernels.rotate_kernel, {**PLAIN, "PER_TOKEN": True, "CONJUGATE": False, "SPLIT": False}),
    "split": (triton_kernels.rotate_kernel, {**PLAIN, "CONJUGATE": False, "SPLIT": True}),
    "frequency_gradient": (triton_kernels.rotate_backward_kernel, {**PLAIN, "CONJUGATE": True, "ALONG": False}),
    "table_gradient": (
        triton_kernels.rotate_backward_kernel,
        {**PLAIN, "TABLE": True, "CONJUGATE": True, "ALONG": True},
    ),
    "any_stride": (triton_kernels.rotate_kernel, {**PLAIN, "CONJUGATE": False, "SPLIT": False, "UNIT": False}),
    "partial": (triton_kernels.rotate_kernel, {**PLAIN, "CONJUGATE": False, "SPLIT": False, "HALF": 32, "TAIL": 192}),
    "partial_gradient": (
        triton_kernels.rotate_backward_kernel,
        {**PLAIN, "CONJUGATE": True, "ALONG": False, "HALF": 32, "TAIL": 192},
    ),
    "partial_norm": (triton_kernels.norm_rotate_kernel, {**PLAIN, "HALF": 16, "TAIL": 112}),
    "partial_norm_backward": (triton_kernels.norm_rotate_backward_kernel, {**PLAIN, "HALF": 16, "TAIL": 112}),
    "norm": (triton_kernels.norm_rotate_kernel, PLAIN),
    "norm_backward": (triton_kernels.norm_rotate_backward_kernel, PLAIN),
}
POINTERS = {
    "first": "*i64",
    "second": "*fp64",
    **dict.fromkeys(("amplitude", "along", "across", "weight_grad"), "*fp32"),
}
HEAD_POINTERS = ("q", "k", "q_out", "k_out", "q_grad", "k_grad", "q_weight", "k_weight")
FLOATS = ("scale", "eps", "offset")


def compile_case(name: str, target: str) -> Any:
    kernel, options = CASES[name]
    options = {"HALF": HALF, "TAIL": 0, "UNIT": True, **options}
    half, tail, unit = options["HALF"], options["TAIL"], options.pop("UNIT")
    pairs = widest_tile(half, tail, whole="norm" in name)
    launch = default_launch(1, 131_072, HEADS, pairs, lanes=TARGETS[target].warp_size)
    constants = {
        **options,
        "HALF_BLOCK": triton.next_power_of_2(half),
        "TAIL_BLOCK": triton.next_power_of_2(max(tail, 1)),
        "BLOCK_SEQ": launch.block_seq,
        "HEADS": launch.heads,
    }
    signature, values, divisible = {}, {}, {}
    for index, parameter in enumerate(inspect.signature(kernel.fn).parameters):
        if parameter in constants:
            signature[parameter], values[parameter] = "constexpr", constants[parameter]
        elif parameter in HEAD_POINTERS or parameter in POINTERS:
            table = options["TABLE"] and parameter in ("first", "second")
            signature[parameter] = "*bf16" if parameter in HEAD_POINTERS else "*fp32" if table else POINTERS[parameter]
            divisible[(index,)] = [["tt.divisibility", 16]]
        elif parameter in FLOATS:
            signature[parameter] = "fp32"
        elif unit and (parameter.endswith("_d") or parameter in ("first_h", "second_h")):
            signature[parameter], values[parameter] = "constexpr", 1  # as the launcher specialises a stride of 1
        else:
            signature[parameter] = "i32"
            if re.search(r"_(b|h|s|low)$", parameter):
                divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, divisible)
    return triton.compile(
        source, target=TARGETS[target], options={"num_warps": launch.num_warps, "enable_fp_fusion": False}
    )


def resources(compiled: Any, target: str) -> dict[str, int]:
    """Registers per thread, spilled registers and bytes of stack."""
    if target == "gfx942":
        text = compiled.asm["amdgcn"]
        found = {
            "registers": re.search(r"\.vgpr_count:\s+(\d+)", text),
            "spills": re.search(r"\.vgpr_spill_count:\s+(\d+)", text),
            "stack": re.search(r"\.private_segment_fixed_size:\s+(\d+)", text),
        }
        counts = {name: int(match.group(1)) for name, match in found.items() if match}
        counts["spills"] += int(re.search(r"\.sgpr_spill_count:\s+(\d+)", text).group(1))  # type: ignore[union-attr]
        return counts
    arch = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}[target]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        command = [TOOLS / "ptxas-blackwell", "-v", f"-arch={arch}", "--fmad=false", path, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack, stores, loads = (
        int(number)
        for number in re.search(  # type: ignore[union-attr]
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        ).groups()
    )
    registers = int(re.search(r"Used (\d+) registers", text).group(1))  # type: ignore[union-attr]
    return {"registers": registers, "spills": stores + loads, "stack": stack}


def facts(name: str, target: str) -> dict[str, Any]:
    compiled = compile_case(name, target)
    ttir = compiled.asm["ttir"]
    code = compiled.asm["amdgcn" if target == "gfx942" else "ptx"]
    wide = (
        r"global_(load|store)_dwordx4|buffer_(load|store)_dwordx4"
        if target == "gfx942"
        else r"(ld|st)\.global\S*\.v4\.b32"
    )
    # Of the tensors q and k: the angles' own loads are of other widths.
    narrow = (
        r"global_(load|store)_short|global_(load|store)_ushort" if target == "gfx942" else r"(ld|st)\.global\S*\.b16"
    )
    return {
        "kernel": name,
        "target": target,
        **resources(compiled, target),
        "wide_loads": sum(m.group(0).find("ld") == 0 or "load" in m.group(0) for m in re.finditer(wide, code)),
        "wide_stores": sum(m.group(0).find("st") == 0 or "store" in m.group(0) for m in re.finditer(wide, code)),
        "narrow_accesses": len(re.findall(narrow, code)),
        "bf16_arithmetic": len(re.findall(r"arith\.(?:addf|subf|mulf|divf|negf)[^\n]*bf16|math\.fma[^\n]*bf16", ttir)),
        "multiplies_32_bit": len(re.findall(r"arith\.muli[^\n]*\bi32\b|arith\.muli[^\n]*xi32>", ttir)),
        "multiplies_64_bit": len(re.findall(r"arith\.muli[^\n]*i64", ttir)),
    }


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    work = [(name, target) for name in names for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda pair: facts(*pair), work))
    print(json.dumps(results))  # noqa: T201


if __name__ == "__main__":
    main()
