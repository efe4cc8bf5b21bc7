"""What the READMEs name exists: links, paths, commands with their flags, settings, imports. Nothing
is run; the commands' own parsers read the commands.
"""

import ast
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import test_layout

from recr1 import cli
from recr1.config.loader import get_value
from recr1.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
TOP = ("recr1", "kernels", "experiments", "tests")
PAGES = [
    ROOT / "README.md",
    ROOT / ".github/CONTRIBUTING.md",
    *sorted(page for top in TOP for page in (ROOT / top).rglob("README.md")),
]
ROOMS = [
    *(p.parent for p in sorted((ROOT / "recr1").glob("*/__init__.py"))),
    *(ROOT / "recr1", ROOT / "kernels", ROOT / "tests", ROOT / "tests/faults"),
    *(ROOT / "experiments", ROOT / "experiments/prepare", ROOT / "experiments/benchmarks"),
]

# What a README names and the repository does not hold: a reader's own files, and what a run leaves.
OF_A_USER = {"my_loss.py", "my_task.py", "my_retriever.py", "mine.yaml", "other.yaml"}
OF_A_RUN = {"config.yaml", "recr1.yaml", "model", "checkpoints", "heartbeats", "nonfinite", "runs"}
OF_A_CONFIG = {"prompt.file"}  # a key of the YAML, not of Config
CHECKED_SUFFIXES = {".py", ".sh", ".md", ".yaml", ".ipynb", ".js"}
# Words in capitals stand for what a reader puts there: RUN, DIR, N, K, CONFIG.yaml, NAME.py.
PLACEHOLDER = re.compile(r"^~|[*$<]|(^|/)[A-Z][A-Z0-9]*(\.\w+)?(/|$)")
PROGRAMS = ("bash", "python", "torchrun", "recr1", "pytest")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def in_backticks(page: Path) -> list[str]:
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


@pytest.fixture(params=PAGES, ids=name_of)
def page(request) -> Path:
    return request.param


def test_every_room_has_a_readme_that_names_its_files():
    for room in ROOMS:
        readme = room / "README.md"
        assert readme.exists(), f"{name_of(room)} has no README.md"
        if room.parent == ROOT / "recr1" or room == ROOT / "kernels":
            named = set(re.findall(r"([\w/]+\.py)\b", text_of(readme)))
            files = {str(p.relative_to(room)) for p in room.rglob("*.py")}
            missing = {f for f in files if Path(f).name != "__init__.py"} - named
            assert not missing, f"{name_of(readme)} does not name {sorted(missing)}"


def test_the_order_of_rooms_is_the_one_that_imports_keep():
    text = text_of(ROOT / "recr1/README.md")
    assert " ".join(test_layout.ROOMS) in " ".join(text.split())


def test_the_table_of_rooms_has_the_imports_that_are_there():
    modules = test_layout.modules()
    imports = {}
    for name, path in modules.items():
        if "." in name:
            targets = test_layout.imports_of(name, path, modules)
            units = {test_layout.unit(target) for target in targets}
            imports.setdefault(test_layout.unit(name), set()).update(units)
    rows = re.findall(r"^\| \[(\w+)\]\(.*?\) \| (.*?) \|", text_of(ROOT / "recr1/README.md"), re.M)
    told = {room: set(re.findall(r"\w+", text)) - {"nothing"} for room, text in rows}
    assert len(told) >= 15
    for room in set(told) - {"training", "commands"}:  # they import nearly everything
        assert told[room] == imports[room] - {room}, room


def test_the_main_readme_is_short():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= 250
    assert not [line for line in lines if len(line) > 120]


# --- links and paths ---------------------------------------------------------------------------


def heading_anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def check_links(page: Path) -> list[str]:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or (anchor and anchor not in heading_anchors(to)):
            wrong.append(target)
    return wrong


def test_links_lead_somewhere(page):
    assert not check_links(page)


def test_links_of_the_results_lead_somewhere():
    assert not check_links(ROOT / "experiments/RESULTS.md")


def looks_like_a_path(text: str) -> bool:
    if not re.fullmatch(r"[\w.\-/]+", text) or PLACEHOLDER.search(text):
        return False
    first = text.split("/")[0]
    if text in OF_A_USER or first in OF_A_RUN or text == "__init__.py":
        return False
    return first in TOP and "/" in text or Path(text).suffix in CHECKED_SUFFIXES


def exists_near(text: str, page: Path) -> bool:
    # Test files have unique names; what configs share is in a folder of theirs.
    if re.fullmatch(r"test_\w+\.py", text):
        return any((ROOT / "tests").rglob(text))
    bases = (page.parent, ROOT, ROOT / "experiments", ROOT / "experiments/configs")
    return any((base / text).exists() for base in bases)


def test_paths_in_backticks_exist(page):
    paths = [text for text in in_backticks(page) if looks_like_a_path(text)]
    assert not [text for text in paths if not exists_near(text, page)]


def test_the_configs_of_the_table_are_those_that_are_there():
    experiments = ROOT / "experiments"
    text = text_of(experiments / "README.md")
    table = text.split("| config | folder | what |\n|---|---|---|\n")[1].split("\n\n")[0]
    named = []
    for row in table.splitlines():
        names, folder, _ = row.split(" | ")
        place = experiments if folder == "here" else experiments / folder.strip("`")
        named += [place / f"{name}.yaml" for name in re.findall(r"`([^`]+)`", names)]

    there = {experiments / "quickstart.yaml"}
    for folder in ("cpu", "rec_r1", "recllm_r1"):
        there.update((experiments / "configs" / folder).glob("*.yaml"))
    assert sorted(named) == sorted(there)


# --- commands ----------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page: in its fences and in backticks."""
    lines = in_backticks(page)
    for language, content in fences(page):
        if language in ("", "bash"):
            lines += [part for line in content.splitlines() for part in line.split(";")]
    found = []
    for line in lines:
        command = line.strip().removeprefix("$ ").removeprefix("do ")
        if command.split(" ")[0] in PROGRAMS:
            found.append(shlex.split(command, comments=True))
    return found


def check_file(path: str, flags: list[str]) -> str | None:
    if PLACEHOLDER.search(path):
        return None if (ROOT / path).parent.is_dir() else f"no folder of {path}"
    if not (ROOT / path).is_file():
        return f"no file {path}"
    source = text_of(ROOT / path)
    if path.startswith("experiments/prepare/"):  # whose command line is made there
        source += text_of(ROOT / "experiments/prepare/writing.py")
    unknown = [flag for flag in flags if f'"{flag}"' not in source]
    return f"{path} has no {unknown[0]}" if unknown and path.endswith(".py") else None


def check_overrides(words: list[str]) -> str | None:
    for word in words:
        if re.match(r"[a-z]\w*\.\w+=", word) and word != "a.b=value":
            try:
                get_value(Config(), word.partition("=")[0])
            except AttributeError:
                return f"no setting {word}"
    return None


def check_recr1(words: list[str]) -> str | None:
    """Read by the command's own parser; a command's bare name only has to be one."""
    words = [word.strip("[]") for word in words]
    if words[0] in ("...", "COMMAND"):
        return None
    words = ["1" if word in ("N", "K") else word for word in words]
    parser = cli.build_parser()
    if len(words) == 1:
        words = [*words, "--help"]
    try:
        _, rest = parser.parse_known_args(words)
    except SystemExit as e:
        return None if e.code == 0 else "is refused by the parser"
    unknown = [word for word in rest if "=" not in word]
    return f"no argument {unknown[0]}" if unknown else check_overrides(rest)


def check_module(words: list[str]) -> str | None:
    module, *rest = words
    if module == "recr1.cli":
        return check_recr1(rest) if rest else None
    if not is_module(module):
        return f"no module {module}"
    paths = [w for w in rest if re.search(r"\.(yaml|py)$", w) and "=" not in w]
    missing = [p for p in paths if not (PLACEHOLDER.search(p) or p in OF_A_USER)]
    missing = [p for p in missing if not (ROOT / p).exists()]
    if missing:
        return f"no file {missing[0]}"
    flags = [word.strip("[]") for word in rest if word.strip("[]").startswith("--")]
    known = {"recr1.doctor": {"--run", "--json"}}.get(module, {"--dry-run"})
    if set(flags) - known:
        return f"{module} has no {flags}"
    return check_overrides(rest)


@cache
def is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_command(words: list[str]) -> str | None:
    program, *rest = words
    if not rest:
        return None
    if program == "recr1":
        return check_recr1(rest)
    if program in ("python", "torchrun") and "-m" in rest:
        return check_module(rest[rest.index("-m") + 1 :])
    is_script = re.compile(r"/|\.(py|sh)$" if program == "bash" else r"\.py$")
    paths = [word for word in rest if is_script.search(word)]
    if program == "torchrun" and not paths:
        return None
    if not paths:
        return "names no file"
    return check_file(paths[0], [word for word in rest if word.startswith("--")])


def test_commands_name_files_and_flags_that_exist(page, capsys):
    wrong = [(" ".join(c), error) for c in commands(page) if (error := check_command(c))]
    assert not wrong


def test_wrong_commands_are_found(capsys):
    """The check itself: each of these but the first has something that is not there."""
    assert check_command("python experiments/prepare/NAME.py --out DIR".split()) is None
    for command in (
        "bash experiments/quickstarts.sh",
        "python experiments/prepare/msrd.py --outer DIR",
        "python -m recr1.training_loop X.yaml",
        "python -m recr1.train X.yaml loss.kid=1",
        "python -m recr1.train experiments/quick.yaml",
        "python -m recr1.doctor --jason",
        "recr1 plan CONFIG.yaml --gpus N",
        "recr1 explains --run RUN --step K",
        "recr1 report RUN --inn F",
    ):
        assert check_command(command.split()), command


# --- settings and imports ----------------------------------------------------------------------


def test_settings_in_backticks_exist(page):
    sections = "|".join(Config.__dataclass_fields__)
    keys = [re.match(rf"(?:{sections})\.[a-z_]+(?=$|[=:])", text) for text in in_backticks(page)]
    unknown = []
    for key in {match[0] for match in keys if match} - OF_A_CONFIG:
        if Path(key).suffix in CHECKED_SUFFIXES:  # run.sh
            continue
        try:
            get_value(Config(), key)
        except AttributeError:
            unknown.append(key)
    assert not unknown


def test_imports_of_the_examples_exist(page):
    for language, content in fences(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("recr1"):
                source = importlib.import_module(node.module)
                for alias in node.names:
                    inside = hasattr(source, alias.name)
                    assert inside or is_module(f"{node.module}.{alias.name}"), alias.name
