"""Compile every Triton kernel for GPUs this machine lacks and print, as one line of JSON, what
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
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from recr1.kernels import decoder_layer, group_loss, logprob, sample_token

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
FIRST_STEP = dict(old_logp=None, ref_logp=None)
FLAGS = dict(CISPO=False, CAPPED=True)
GRADIENT = dict(logits=H, target=I, logsumexp=F, grad_logp=F, temperature="fp32", STRIDE="i32")
ENTROPY = dict(entropy=F, grad_entropy=F)
NO_ENTROPY = dict(entropy=None, grad_entropy=None)
SAMPLE = dict(ids=I, logp=F, truncated_mass=F, temperature="fp32", top_p="fp32")
LENGTHS = [1, 2, 15, 16, 17, 1000, 4096, 65536]

head = logprob.get_kernels()
group = group_loss.get_kernels()
sampler = sample_token.get_kernels()
layer = decoder_layer.get_kernels()


class Case(NamedTuple):
    kernel: object
    types: dict  # of the arguments
    constants: dict
    warps: int


CASES = {}
CASES["statistics"] = Case(
    head.statistics_kernel,
    dict(logits=H, target=I, logp=F, entropy=F, logsumexp=F, temperature="fp32"),
    dict(V=V, STRIDE=STRIDE, TILE=8192),
    8,
)
CASES["gradient"] = Case(
    head.gradient_kernel,
    GRADIENT,
    dict(**NO_ENTROPY, TILE=4096),
    4,
)
CASES["gradient with entropy"] = Case(
    head.gradient_kernel,
    GRADIENT | ENTROPY,
    dict(TILE=4096),
    4,
)
CASES["tokens"] = Case(
    group.token_kernel,
    dict(logp=F, **TOKEN, grad_logp=F, sums=F, N="i32", **LOSS),
    dict(**FLAGS, TILE=1024),
    4,
)
CASES["tokens, first step"] = Case(
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
    dict(**FIRST_STEP, CISPO=False, CAPPED=False, TILE=1024),
    4,
)
CASES["joined"] = Case(
    group.joined_kernel,
    dict(logits=H, target=I, **TOKEN, logp=F, entropy=F, sums=F, temperature="fp32", **LOSS),
    dict(**FLAGS, V=V, STRIDE=STRIDE, TILE=8192),
    32,
)
CASES["choose greedy"] = Case(
    sampler.sample_token_kernel,
    dict(logits=H, **SAMPLE),
    dict(V=V, STRIDE=STRIDE, BITS=0, TILE=8192, uniforms=None),
    8,
)
# logits, bits of the nucleus' threshold
SAMPLERS = {
    "choose bf16": (H, 0),
    "choose float32": (F, 0),
    "choose nucleus, bf16": (H, 16),
    "choose nucleus, float32": (F, 32),
}
for name, (logits, bits) in SAMPLERS.items():
    CASES[name] = Case(
        sampler.sample_token_kernel,
        dict(logits=logits, uniforms=D, **SAMPLE),
        dict(V=V, STRIDE=STRIDE, BITS=bits, TILE=8192),
        8,
    )
CASES["advantage"] = Case(
    group.advantage_kernel,
    dict(rewards=F, advantages=F, floor="fp32"),
    dict(G=12, OTHERS=11, TILE=16, KIND=0),
    4,
)
# a 3B model's width and heads, and the width of a 0.5B one, which is no power of two
CASES["norm 2048"] = Case(
    layer.rms_norm_kernel,
    dict(x=H, weight=H, out=H, inverse_rms=F, eps="fp32"),
    dict(C=2048, TILE=2048),
    8,
)
CASES["norm 896"] = CASES["norm 2048"]._replace(constants=dict(C=896, TILE=1024), warps=4)
CASES["norm_grad"] = Case(
    layer.rms_norm_grad_kernel,
    dict(grad=H, x=H, weight=H, inverse_rms=F, d_x=H, d_weight=F, M="i32"),
    dict(C=2048, TILE=2048),
    8,
)
CASES["rotary"] = Case(
    layer.rotary_kernel,
    dict(x=H, cos=H, sin=H, out=H),
    dict(BACKWARD=False, H=16, HALF=64, HEAD_TILE=16, TILE=64),
    4,
)
CASES["swiglu"] = Case(
    layer.swiglu_kernel,
    dict(gate=H, up=H, out=H, M="i32"),
    dict(F=11_008, TILE=1024),
    4,
)
CASES["swiglu_grad"] = Case(
    layer.swiglu_grad_kernel,
    dict(grad=H, gate=H, up=H, d_gate=H, d_up=H, M="i32"),
    dict(F=11_008, TILE=1024),
    4,
)


def compile_case(case: Case, capability: int):
    """Compile a kernel as its launcher would: pointers of torch's allocator and strides are
    multiples of 16, and N is not specialized.
    """
    position = case.kernel.arg_names.index
    signature = {}
    attributes = {}
    for name in case.kernel.arg_names:
        kind = case.types.get(name, "constexpr")
        signature[name] = kind
        is_pointer = kind.startswith("*")
        is_stride = name == "STRIDE" and name in case.types
        if is_pointer or is_stride:
            attributes[(position(name),)] = [["tt.divisibility", 16]]
    constants = {(position(name),): value for name, value in case.constants.items()}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": case.warps})


def measure_code(binary) -> dict:
    """Count what the machine code holds."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    ptx = binary.asm["ptx"]
    return dict(
        registers=read_usage("REG", usage),
        spills=read_usage("STACK", usage) + read_usage("LOCAL", usage),
        shared=binary.metadata.shared,
        rounded=count_matches(r"cvt\.rn\.bf16", ptx),
        cut=count_matches(r"cvt\.r[zmp]i?\.bf16", ptx),
        wide_loads=count_matches(r"\bLDG\S*\.128", code),
        wide_stores=count_matches(r"\bSTG\S*\.128", code),
    )


def run_tool(name: str, *arguments: str) -> str:
    """Return what a tool that comes with Triton prints."""
    command = [TOOLS / name, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return process.stdout


def read_usage(name: str, usage: str) -> int:
    """Read the figure of that name, of which there must be one."""
    [number] = re.findall(rf"\b{name}:(\d+)", usage)
    return int(number)


def count_matches(pattern: str, text: str) -> int:
    matches = re.findall(pattern, text)
    return len(matches)


def count_variants(lengths: list[int]) -> int:
    """Count the different keys under which the launcher would look for `tokens`."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernel = group.token_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    tensor = torch.zeros(16)
    index = torch.zeros(16, dtype=torch.int64)
    # in the kernel's order: logp, TOKEN's without old and reference, grad_logp, sums
    tensors = (tensor, None, None, tensor, index, tensor, tensor, tensor, tensor)
    loss = (0.1, 0.8, 1.2, 0.0, 0.0)
    flags = (False, False)
    keys = set()
    for length in lengths:
        _, key, *_ = bind(*tensors, length, *loss, *flags, TILE=1024)
        keys.add(str(key))
    return len(keys)


def main() -> None:
    capabilities = [int(argument) for argument in sys.argv[1:]]
    code = {}
    for name, case in CASES.items():
        for capability in capabilities:
            binary = compile_case(case, capability)
            code[f"{name} sm_{capability}"] = measure_code(binary)
    code["variants"] = count_variants(LENGTHS)
    print(json.dumps(code))


if __name__ == "__main__":
    main()
