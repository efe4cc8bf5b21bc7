"""The shape of the repository: the order of its rooms, what stands where. Nothing here
runs the product.
"""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# An import goes to an earlier room of this list, never back. Inside a room files import each other
# without a circle. recr1/README.md draws the same order.
ROOMS = (
    "utils distributed data_types kernels config model data sampling rl retrieval memory tasks "
    "tracking evaluation report training plain train sft doctor commands cli"
).split()


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every source file of the package; an `__init__.py` goes by its
    package's name.
    """
    found = {}
    for top, name in ((ROOT / "recr1", "recr1"), (ROOT / "kernels", "recr1.kernels")):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top).with_suffix("").parts
            found[".".join((name, *(p for p in parts if p != "__init__")))] = path
    return found


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def unit(module: str) -> str:
    return module.split(".")[1]


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Names of the recr1 modules that the file imports anywhere, in functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                if node.level
                else ""
            )
            base = ".".join(filter(None, (base, node.module)))
            # `from .a import b`: b is a module or a name inside a
            found |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            }
    return {module for module in found if module.startswith("recr1.")}


def test_imports_go_to_an_earlier_room():
    known = modules()
    wrong = []
    for name, path in known.items():
        if name in ("recr1", "recr1.kernels"):
            continue
        where = path.relative_to(ROOT)
        assert unit(name) in ROOMS, (
            f"{where}: {unit(name)!r} is no room of tests/repo/test_layout.py"
        )
        for target in sorted(imports_of(name, path, known)):
            if unit(target) == unit(name):
                continue
            if ROOMS.index(unit(target)) >= ROOMS.index(unit(name)):
                wrong.append(f"{where} imports {target}")
    assert not wrong, "imports that go back to a later room:\n" + "\n".join(wrong)


def test_no_circles_inside_a_folder():
    known = modules()
    inside = {
        name: {t for t in imports_of(name, path, known) if unit(t) == unit(name)}
        for name, path in known.items()
        if name != "recr1"
    }
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as e:
        pytest.fail("circle of imports: " + " <- ".join(e.args[1]))


def run_at_import(node: ast.AST):
    """Yield every node that runs when the module is imported.

    That is all but the bodies of functions, and what only a type checker reads.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from run_at_import(child)


def test_nothing_imports_triton_or_transformers_at_import_time():
    """The CPU path runs without Triton; transformers' models take seconds to import, which every
    rank would wait for.
    """
    for path in modules().values():
        for node in run_at_import(parse(path)):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            found = {"triton", "transformers"} & {name.split(".")[0] for name in names}
            assert not found, (
                f"{path.relative_to(ROOT)}:{node.lineno} imports {found} at import time: "
                "import it in the function that needs it"
            )


def test_every_module_imports_without_the_optional_packages():
    script = (
        "import importlib, sys\n"
        "for name in ('triton', 'faiss', 'flash_attn', 'numba'): sys.modules[name] = None\n"
        f"for name in {sorted(modules())!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_top_level_holds_nothing_else():
    git = (
        subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if (ROOT / ".git").exists()
        else None
    )
    if git and git.returncode == 0:
        found = {line.split("/")[0].strip('"') for line in git.stdout.splitlines()}
    else:
        # an unpacked archive: without .gitignore's help, what builds and runs leave is named here
        found = {
            p.name
            for p in ROOT.iterdir()
            if p.name not in ("build", "dist", "runs", "__pycache__") and p.suffix != ".egg-info"
        }
    extra = {name for name in found if not name.startswith(".")} - set(
        "recr1 kernels experiments tests setup.py README.md LICENSE".split()
    )
    assert not extra, f"at the top level and not allowed there: {sorted(extra)}"


MAX_LINES = 60
TRITON = "Triton finds helpers among the globals of the function that makes the kernels"
NUMBA = "numba caches no function that calls another one made in the same place"
LONG_FUNCTIONS = {  # (file, function): why it is longer
    ("kernels/group_loss.py", "get_kernels"): TRITON,
    ("kernels/group_loss.py", "compute_token_loss"): "one kernel: the formula from top to bottom",
    ("kernels/group_loss.py", "token_kernel"): "one kernel, most of it its arguments",
    ("kernels/group_loss.py", "joined_kernel"): "one kernel, most of it its arguments",
    ("kernels/logprob.py", "get_kernels"): TRITON,
    ("kernels/sample_token.py", "get_kernels"): TRITON,
    ("kernels/sample_token.py", "sample_token_kernel"): "one kernel: two passes over a row",
    ("recr1/retrieval/bm25/numba_scorer.py", "_compile_search"): NUMBA,
    ("recr1/retrieval/bm25/numba_scorer.py", "search_batch"): NUMBA,
}


def test_functions_fit_on_a_screen():
    """No function is longer than MAX_LINES but those with a reason; no reason outlives its need."""
    found = set()
    for path in modules().values():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_LINES:
                found.add((path.relative_to(ROOT).as_posix(), node.name))

    assert found == set(LONG_FUNCTIONS)
