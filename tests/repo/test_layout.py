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


def list_modules() -> dict[str, Path]:
    """List dotted name -> file, for every source file of the package.

    An `__init__.py` goes by its package's name.
    """
    modules = {}
    for top, name in ((ROOT / "recr1", "recr1"), (ROOT / "kernels", "recr1.kernels")):
        for path in top.rglob("*.py"):
            module = path.relative_to(top).with_suffix("")
            if module.name == "__init__":
                module = module.parent
            dotted_name = ".".join((name, *module.parts))
            modules[dotted_name] = path
    return modules


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_room(module: str) -> str:
    """Name the room that a dotted name is in."""
    return module.split(".")[1]


def resolve_base(node: ast.ImportFrom, package: str) -> str:
    """Give the absolute dotted name of `from X import`; package: where the statement is."""
    if node.level == 0:
        return node.module
    parents = package.split(".")
    kept_parents = len(parents) - node.level + 1
    names = parents[:kept_parents]
    if node.module:
        names.append(node.module)
    return ".".join(names)


def list_imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """List the recr1 modules that the file imports anywhere, in functions too."""
    package = name
    if path.name != "__init__.py":
        package = name.rpartition(".")[0]
    imports = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_base(node, package)
            for alias in node.names:
                # `from .a import b`: b is a module or a name inside a
                submodule = f"{base}.{alias.name}"
                imports.add(submodule if submodule in modules else base)
    return {module for module in imports if module.startswith("recr1.")}


def test_imports_go_to_an_earlier_room():
    modules = list_modules()
    wrong = []
    for name, path in modules.items():
        if name in ("recr1", "recr1.kernels"):
            continue
        where = path.relative_to(ROOT)
        room = name_room(name)
        assert room in ROOMS, f"{where}: {room!r} is no room of tests/repo/test_layout.py"
        for target in sorted(list_imports(name, path, modules)):
            target_room = name_room(target)
            is_later = ROOMS.index(target_room) > ROOMS.index(room)
            if is_later:
                wrong.append(f"{where} imports {target}")
    assert not wrong, "imports that go back to a later room:\n" + "\n".join(wrong)


def test_no_circles_inside_a_folder():
    modules = list_modules()
    imports_inside = {}
    for name, path in modules.items():
        if name == "recr1":
            continue
        room = name_room(name)
        targets = list_imports(name, path, modules)
        imports_inside[name] = {target for target in targets if name_room(target) == room}

    try:
        TopologicalSorter(imports_inside).prepare()
    except CycleError as error:
        pytest.fail("circle of imports: " + " <- ".join(error.args[1]))


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


def list_packages(node: ast.AST) -> set[str]:
    """List the first words of the names that a node imports; of another node: none."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [node.module]
    return {name.split(".")[0] for name in names}


def test_nothing_imports_triton_or_transformers_at_import_time():
    """The CPU path runs without Triton; transformers' models take seconds to import, which every
    rank would wait for.
    """
    for path in list_modules().values():
        for node in run_at_import(parse(path)):
            forbidden = {"triton", "transformers"} & list_packages(node)
            assert not forbidden, (
                f"{path.relative_to(ROOT)}:{node.lineno} imports {forbidden} at import time: "
                "import it in the function that needs it"
            )


def test_every_module_imports_without_the_optional_packages():
    names = sorted(list_modules())
    script = (
        "import importlib, sys\n"
        "for name in ('triton', 'faiss', 'flash_attn', 'numba'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


TOP_LEVEL = {"recr1", "kernels", "experiments", "tests", "setup.py", "README.md", "LICENSE"}
LEFT_BY_BUILDS_AND_RUNS = {"build", "dist", "runs", "__pycache__"}


def list_top_level_of_git() -> set[str] | None:
    """List what is at the top and not ignored by git; None where git does not know."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        return None
    names = set()
    for line in result.stdout.splitlines():
        first_part = line.split("/")[0]
        names.add(first_part.strip('"'))
    return names


def list_top_level_of_archive() -> set[str]:
    """List what is at the top of an unpacked archive, but what builds and runs leave there."""
    names = {path.name for path in ROOT.iterdir() if path.suffix != ".egg-info"}
    return names - LEFT_BY_BUILDS_AND_RUNS


def test_top_level_holds_nothing_else():
    names = list_top_level_of_git()
    if names is None:
        names = list_top_level_of_archive()

    visible_names = {name for name in names if not name.startswith(".")}
    extra = sorted(visible_names - TOP_LEVEL)
    assert not extra, f"at the top level and not allowed there: {extra}"


MAX_LINES = 60
TRITON = "Triton finds helpers among the globals of the function that makes the kernels"
NUMBA = "numba caches no function that calls another one made in the same place"
LONG_FUNCTIONS = {  # (file, function): why it is longer
    ("kernels/group_loss.py", "get_kernels"): TRITON,
    ("kernels/group_loss.py", "compute_token_loss"): "one kernel: the formula from top to bottom",
    ("kernels/group_loss.py", "token_kernel"): "one kernel, most of it its arguments",
    ("kernels/group_loss.py", "joined_kernel"): "one kernel, most of it its arguments",
    ("kernels/logprob.py", "get_kernels"): TRITON,
    ("kernels/decoder_layer.py", "get_kernels"): TRITON,
    ("kernels/sample_token.py", "get_kernels"): TRITON,
    ("kernels/sample_token.py", "sample_token_kernel"): "one kernel: two passes over a row",
    ("recr1/plain.py", "train"): "algorithm 1 of DeepSeekMath from top to bottom",
    ("recr1/retrieval/bm25/numba_scorer.py", "_compile_search"): NUMBA,
    ("recr1/retrieval/bm25/numba_scorer.py", "search_batch"): NUMBA,
}


def test_functions_fit_on_a_screen():
    """No function is longer than MAX_LINES but those with a reason; no reason outlives its need."""
    long_functions = set()
    for path in list_modules().values():
        file = path.relative_to(ROOT).as_posix()
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef):
                continue
            if node.end_lineno - node.lineno >= MAX_LINES:
                long_functions.add((file, node.name))

    assert long_functions == set(LONG_FUNCTIONS)


def test_no_two_test_files_have_one_name():
    """pytest imports a test file by its name alone, and refuses the second one."""
    paths_by_name: dict[str, list[Path]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        paths_by_name.setdefault(path.name, []).append(path)

    assert [paths for paths in paths_by_name.values() if len(paths) > 1] == []
