"""Put the stand-in in the place of torch.cuda's functions, those that the product calls.

The others stay torch's own, and raise: a torch without CUDA has no GPU.
"""

from typing import Any

import torch
import torch._dynamo  # before: at its import it lists torch.cuda's functions, which must differ
import torch.distributed as td
from gpu.standin import graphs, streams
from gpu.standin.activity import activity
from gpu.standin.tensor import DEVICE_INDEX, NUM_DEVICES

TOTAL_MEMORY = 140 << 30  # an H200's
NAME = "a stand-in GPU"
COMPUTE_CAPABILITY = (9, 0)


def get_free_memory(device: Any = None) -> tuple[int, int]:
    return TOTAL_MEMORY - count_allocated_bytes(), TOTAL_MEMORY


def count_allocated_bytes(device: Any = None) -> int:
    return streams.Allocation.total_bytes


def set_sync_debug_mode(mode: str) -> None:
    """Let a wait of the host raise HostWait ("error"), or be counted only ("default")."""
    activity.sync_debug_mode = mode


def get_rng_state(device: Any = None) -> torch.Tensor:
    """Nothing on the stand-in draws by the GPU's own generator."""
    return torch.zeros(16, dtype=torch.uint8)


def do_nothing(*_: Any, **__: Any) -> None:
    pass


REPLACED = dict(
    # the device
    _lazy_init=do_nothing,
    current_device=lambda: DEVICE_INDEX,
    device_count=lambda: NUM_DEVICES,
    get_device_capability=lambda device=None: COMPUTE_CAPABILITY,
    get_device_name=lambda device=None: NAME,
    is_available=lambda: True,
    is_initialized=lambda: True,
    set_device=do_nothing,
    # memory
    empty_cache=do_nothing,
    max_memory_allocated=count_allocated_bytes,
    max_memory_reserved=count_allocated_bytes,
    mem_get_info=get_free_memory,
    memory_allocated=count_allocated_bytes,
    memory_reserved=count_allocated_bytes,
    reset_peak_memory_stats=do_nothing,
    # random numbers
    get_rng_state=get_rng_state,
    set_rng_state=do_nothing,
    # streams and graphs
    CUDAGraph=graphs.Graph,
    Stream=streams.Stream,
    current_stream=lambda device=None: streams.get_current_stream(),
    graph=graphs.capture,
    graph_pool_handle=object,
    set_sync_debug_mode=set_sync_debug_mode,
    stream=streams.use_stream,
    synchronize=streams.synchronize,
)


def replace_torch_cuda() -> None:
    """Replace them, for the rest of the process."""
    for name, value in REPLACED.items():
        setattr(torch.cuda, name, value)
    torch.backends.cuda.is_flash_attention_available = lambda: True

    # torch.tensor(list, device="cuda") is made on the CPU and copied, where dispatch.py sees it.
    torch._C._set_only_lift_cpu_tensors(True)
    # module.to("cuda") puts new parameters in the place of the CPU's.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    # A wrapper is no inference tensor.
    torch.inference_mode = torch.no_grad

    # Ranks are connected by gloo, which takes the CPU memory.
    init_process_group = td.init_process_group

    def init_with_gloo(backend: str, **settings: Any) -> None:
        init_process_group("gloo", **settings)

    td.init_process_group = init_with_gloo
