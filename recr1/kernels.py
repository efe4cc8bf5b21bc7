"""recr1.kernels: the Triton sources, from the installed package or from the checkout's kernels/ (a
top-level `kernels` would shadow Hugging Face's).
"""

from pathlib import Path

# the folder must have no __init__.py, or an installed recr1/kernels/ is found before this file
_here = Path(__file__).parent
__path__ = [str(p) for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()][:1]
