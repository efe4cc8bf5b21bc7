"""Make recr1.kernels the Triton sources, of the installed package or of the checkout's kernels/.

(A top-level package `kernels` would shadow Hugging Face's.)
"""

from pathlib import Path

# The folder must have no __init__.py, or an installed recr1/kernels/ is imported before this file.
_package = Path(__file__).parent
_candidates = (_package / "kernels", _package.parent / "kernels")
__path__ = [str(folder) for folder in _candidates if folder.is_dir()][:1]
