"""The machine itself: is it the GPU that the expected figures are of?

Expected on an H200, from its data sheet and not measured: 4.8 TB/s of memory, of which a copy
reaches about nine tenths, and 989 TF/s of dense bfloat16 products, of which a large square product
reaches about eight tenths. An H100 has 3.35 TB/s and the same products, an A100 2.0 TB/s and 312
TF/s. A small launch takes the host 4 to 8 microseconds.
"""

from __future__ import annotations

import time

import torch
from gpu_sections.report import Report
from gpu_sections.setting import Setting, measure_copy_rate, relative_error

LAUNCHES = 5000


def check_machine(report: Report, setting: Setting) -> None:
    """A bfloat16 product against float64; a copy's TB/s, a product's TF/s, a launch's time."""
    n = setting.pick(8192, 64)
    a = setting.draw(n, n)
    b = setting.draw(n, n)
    rows = min(n, 256)
    want = a[:rows].double() @ b.double()
    report.at_most("bfloat16 product against float64", relative_error(a[:rows] @ b, want), 1e-2)

    report.figure("kernels", ", ".join(setting.kernels))
    report.figure("copy, TB/s", measure_copy_rate(setting) / 1e12)
    seconds = setting.time_many(lambda: a @ b)
    report.figure("bfloat16 product, TF/s", 2 * n**3 / seconds / 1e12)
    report.figure("launch, us of the host", measure_launch(setting) * 1e6)
    if setting.has_gpu:
        free, total = torch.cuda.mem_get_info()
        report.figure("memory, GiB", total / 2**30)
        report.figure("memory free, GiB", free / 2**30)
        report.figure("compute capability", str(torch.cuda.get_device_capability()))


def measure_launch(setting: Setting) -> float:
    """Return the seconds that the host takes to launch a small kernel."""
    small = setting.draw(8)
    launches = setting.pick(LAUNCHES, 50)
    setting.synchronize()
    began = time.perf_counter()
    for _ in range(launches):
        small.add_(1)
    seconds = (time.perf_counter() - began) / launches
    setting.synchronize()
    return seconds
