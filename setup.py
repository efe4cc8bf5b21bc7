"""Packaging. `recr1.kernels` is the checkout's kernels/ folder: see recr1/kernels.py for why it is
not a top-level package.
"""

from pathlib import Path

from setuptools import find_packages, setup

readme = Path(__file__).parent / "README.md"

setup(
    name="recr1",
    version="0.2.0",
    description="Rec-R1 and RecLLM-R1 from scratch: GRPO for product search and recommendation",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["recr1", "recr1.*"]) + ["recr1.kernels"],
    package_data={"recr1": ["py.typed"], "recr1.report": ["page/*"]},
    package_dir={"recr1": "recr1", "recr1.kernels": "kernels"},
    entry_points={"console_scripts": ["recr1=recr1.cli:run_console_script"]},
    install_requires=[
        # experiments/setup_env.sh keeps a GPU machine's torch when it is in this range
        "torch>=2.11,<2.16",
        "transformers>=5.12,<6",
        "numpy",
        "tqdm",
        "pyyaml",
        "rank-bm25",
        "nltk",  # only its Porter stemmer
        "regex",  # these three come with transformers; named because recr1 imports them itself
        "safetensors",
        "huggingface_hub",
    ],
    extras_require={
        "dense": ["faiss-cpu"],  # one of these two, never both: together they break `import faiss`
        "faiss-gpu": ["faiss-gpu"],
        "flash": ["flash-attn"],  # no wheel: needs nvcc and --no-build-isolation
        "fast": ["numba"],
        "track": ["tensorboard"],
        "docs": ["matplotlib"],  # experiments/walkthrough/walkthrough.ipynb
        "audit": ["lm-eval[hf,ifeval]>=0.4.13"],
        "models": ["gguf", "accelerate"],  # experiments/prepare/convert_gguf.py
        # pyarrow: experiments/prepare/esci.py
        "dev": [
            "pytest",
            "pytest-xdist",
            "gguf",
            "accelerate",
            "peft",
            "ruff",
            "mypy",
            "bm25s",
            "faiss-cpu",
            "matplotlib",
            "numba",
            "pytrec-eval-terrier",
            "pyarrow",
            "setuptools>=77",
            "tensorboard",
            "trl",
            *(f"{name}; sys_platform == 'linux'" for name in ("triton", "liger-kernel")),
        ],
    },
)
