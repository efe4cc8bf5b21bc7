"""Compiles every Triton kernel for GPUs this machine lacks and prints, as one line of JSON, what
the machine code holds, and how many times the token kernel would be compiled over batches of
different lengths. Run by test_kernels.py.

    {"statistics sm_90": {"registers": 80, "spills": 0, "shared": 32, "rounded": 0, "cut": 0,
    "wide_loads": 4, "wide_stores": 0}, ..., "variants": 1}
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from recr1.kernels import group_loss, logprob, sample_token

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Qwen2.5's reachable ids: odd
V = 151_665
STRIDE = 151_680
F = "*fp32"
D = "*fp64"
I = "*i64"
H = "*bf16"
LOSS = dict(inverse="fp32", low="fp32", high="fp32", kl="fp32", cap="fp32")
TOKEN = dict(old_logp=F, ref_logp=F, sampler_logp=F, rollout=I, weight=F, advantages=F)
FLAGS = dict(CISPO=False, CAPPED=True)

head = logprob.get_kernels()
group = group_loss.get_kernels()
CASES = {  # name: kernel, types of its arguments, constants, warps
    "statistics": (
        head.statistics_kernel,
        dict(logits=H, target=I, logp=F, entropy=F, logsumexp=F, temperature="fp32"),
        dict(V=V, STRIDE=STRIDE, TILE=8192),
        8,
    ),
    "gradient": (
        head.gradient_kernel,
        dict(logits=H, target=I, logsumexp=F, grad_logp=F, temperature="fp32", STRIDE="i32"),
        dict(entropy=None, grad_entropy=None, TILE=4096),
        4,
    ),
    "gradient with entropy": (
        head.gradient_kernel,
        dict(
            logits=H,
            target=I,
            logsumexp=F,
            grad_logp=F,
            entropy=F,
            grad_entropy=F,
            temperature="fp32",
            STRIDE="i32",
        ),
        dict(TILE=4096),
        4,
    ),
    "tokens": (
        group.token_kernel,
        dict(logp=F, **TOKEN, grad_logp=F, sums=F, N="i32", **LOSS),
        dict(**FLAGS, TILE=1024),
        4,
    ),
    "tokens, first step": (
        group.token_kernel,
        dict(
            logp=F,
            sampler_logp=F,
            rollout=I,
            weight=F,
            advantages=F,
            grad_logp=F,
            sums=F,
            N="i32",
            **LOSS,
        ),
        dict(old_logp=None, ref_logp=None, CISPO=False, CAPPED=False, TILE=1024),
        4,
    ),
    "joined": (
        group.joined_kernel,
        dict(logits=H, target=I, **TOKEN, logp=F, entropy=F, sums=F, temperature="fp32", **LOSS),
        dict(**FLAGS, V=V, STRIDE=STRIDE, TILE=8192),
        32,
    ),
    **{
        f"choose {name}": (
            sample_token.get_kernels().sample_token_kernel,
            dict(
                logits=kind,
                **({} if greedy else dict(uniforms=D)),
                ids=I,
                logp=F,
                truncated_mass=F,
                temperature="fp32",
                top_p="fp32",
            ),
            dict(
                V=V, STRIDE=STRIDE, BITS=bits, TILE=8192, **(dict(uniforms=None) if greedy else {})
            ),
            8,
        )
        for name, kind, bits, greedy in (
            ("greedy", H, 0, True),
            ("bf16", H, 0, False),
            ("float32", F, 0, False),
            ("nucleus, bf16", H, 16, False),
            ("nucleus, float32", F, 32, False),
        )
    },
    "advantage": (
        group.advantage_kernel,
        dict(rewards=F, advantages=F, floor="fp32"),
        dict(G=12, OTHERS=11, TILE=16, KIND=0),
        4,
    ),
}


def compiled(kernel, types: dict, constants: dict, warps: int, capability: int):
    # as the launcher would: pointers of torch's allocator and strides are multiples of 16, and N is
    # not specialized
    whole = [name for name, kind in types.items() if kind.startswith("*") or name == "STRIDE"]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in whole}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()},
        attrs=attrs,
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}
    )


def measured(binary) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        code = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    [registers], [stack], [local] = (
        re.findall(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL")
    )
    return dict(
        registers=int(registers),
        spills=int(stack) + int(local),
        shared=binary.metadata.shared,
        rounded=len(re.findall(r"cvt\.rn\.bf16", binary.asm["ptx"])),
        cut=len(re.findall(r"cvt\.r[zmp]i?\.bf16", binary.asm["ptx"])),
        wide_loads=len(re.findall(r"\bLDG\S*\.128", code)),
        wide_stores=len(re.findall(r"\bSTG\S*\.128", code)),
    )


def variants(lengths) -> int:
    """Different keys under which the launcher would look for `tokens`."""
    bind = create_function_from_signature(
        group.token_kernel.signature,
        group.token_kernel.params,
        make_backend(GPUTarget("cuda", 90, 32)),
    )
    x = torch.zeros(16)
    index = torch.zeros(16, dtype=torch.int64)
    return len(
        {
            str(
                bind(
                    x,
                    None,
                    None,
                    x,
                    index,
                    x,
                    x,
                    x,
                    x,
                    N,
                    0.1,
                    0.8,
                    1.2,
                    0.0,
                    0.0,
                    False,
                    False,
                    TILE=1024,
                )[1]
            )
            for N in lengths
        }
    )


if __name__ == "__main__":
    code = {
        f"{name} sm_{sm}": measured(compiled(*case, sm))
        for name, case in CASES.items()
        for sm in map(int, sys.argv[1:])
    }
    print(json.dumps(code | {"variants": variants([1, 2, 15, 16, 17, 1000, 4096, 65536])}))
