"""The Triton kernels compile for NVIDIA's cards and fit their memory; what they compute is compared
with the formula in test_talking_heads.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, sys, torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from architectures import talking_heads_triton as kernels

CONSTANTS = {"HEADS": 8, "DIM": 64, "LANES": kernels.LANES, "BLOCK": kernels.BLOCK,
             "OPERAND": tl.bfloat16}
found = {}
for kernel, launch in (
    (kernels.forward_kernel, kernels.FORWARD),
    (kernels.queries_kernel, kernels.BACKWARD),
    (kernels.keys_kernel, kernels.BACKWARD),
):
    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        half = name in ("q", "k", "v", "grad", "out", "dq", "dk", "dv")
        single = name in ("pre", "post", "bias", "lse", "delta", "dpre", "dpost")
        kinds = ((name in CONSTANTS, "constexpr"), (half, "*bf16"), (single, "*fp32"),
                 (name == "scale", "fp32"), (True, "i32"))
        signature[name] = next(kind for true, kind in kinds if true)
        if half or single or (signature[name] == "i32" and name not in ("heads", "n")):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, CONSTANTS, aligned)
    for capability in (80, 90):
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32),
            options={"num_warps": launch[0], "num_stages": launch[1]},
        )
        found[f"{kernel.fn.__name__} {capability}"] = compiled.metadata.shared
print(json.dumps(found))
"""


def test_kernels_compile_and_fit_the_shared_memory(tmp_path):
    """For CaiT-S24 in half precision; Triton carries NVIDIA's assembler, no GPU is needed."""
    root = Path(__file__).resolve().parent.parent.parent
    # The interpreter, which the other tests use, excludes the compiler in a process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    # Triton reads a kernel's source from its file.
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert len(found) == 6
    for name, size in found.items():
        limit = 163 if name.endswith("80") else 227  # KiB a program may have
        assert size <= limit * 1024, f"{name}: {size / 1024:.0f} KiB"
