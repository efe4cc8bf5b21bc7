"""Give this process a stand-in GPU: `install()`, before anything imports torch."""

from gpu.standin.library import load_library


def install() -> None:
    """From here on torch has a GPU, cuda:0, or cuda:LOCAL_RANK under torchrun.

    Raises RuntimeError where torch is imported already.
    """
    load_library()

    # these import torch
    from gpu.standin.dispatch import register_operations
    from gpu.standin.torch_cuda import replace_torch_cuda

    register_operations()
    replace_torch_cuda()
