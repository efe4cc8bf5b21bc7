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
PAGES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md"]
for top in sorted(TOP):
    PAGES += sorted((ROOT / top).rglob("README.md"))
ROOMS = [
    ROOT / "recr1",
    ROOT / "kernels",
    ROOT / "tests",
    ROOT / "tests/faults",
    ROOT / "experiments",
    ROOT / "experiments/prepare",
    ROOT / "experiments/benchmarks",
]
for package in sorted((ROOT / "recr1").glob("*/__init__.py")):
    ROOMS.append(package.parent)

# What a README names and the repository does not hold: a reader's own files, and what a run leaves.
OF_A_USER = {"my_loss.py", "my_task.py", "my_retriever.py", "mine.yaml", "other.yaml"}
OF_A_RUN = {"config.yaml", "recr1.yaml", "model", "checkpoints", "heartbeats", "nonfinite", "runs"}
OF_A_CONFIG = {"prompt.file"}  # a key of the YAML, not of Config
CHECKED_SUFFIXES = {".py", ".sh", ".md", ".yaml", ".ipynb", ".js"}
# Words in capitals stand for what a reader puts there: RUN, DIR, N, K, CONFIG.yaml, NAME.py.
PLACEHOLDER = re.compile(r"^~|[*$<]|(^|/)[A-Z][A-Z0-9]*(\.\w+)?(/|$)")
PROGRAMS = ("bash", "python", "torchrun", "recr1", "pytest")


def read_page(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def list_fences(page: Path) -> list[tuple[str, str]]:
    """List (language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", read_page(page), re.DOTALL | re.MULTILINE)


def read_prose(page: Path) -> str:
    """Read a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", read_page(page), flags=re.DOTALL | re.MULTILINE)


def list_backticks(page: Path) -> list[str]:
    """List what stands in backticks, each with single spaces."""
    texts = []
    for text in re.findall(r"`([^`]+)`", read_prose(page)):
        words = text.split()
        texts.append(" ".join(words))
    return texts


@pytest.fixture(params=PAGES, ids=name_page)
def page(request) -> Path:
    return request.param


def check_names(room: Path, readme: Path) -> None:
    """Check that a room's README names each of its source files."""
    named = re.findall(r"([\w/]+\.py)\b", read_page(readme))
    for path in room.rglob("*.py"):
        if path.name != "__init__.py":
            file = str(path.relative_to(room))
            assert file in named, f"{name_page(readme)} does not name {file}"


def test_every_room_has_a_readme_that_names_its_files():
    for room in ROOMS:
        readme = room / "README.md"
        assert readme.exists(), f"{name_page(room)} has no README.md"
        if room.parent == ROOT / "recr1" or room == ROOT / "kernels":
            check_names(room, readme)


def test_the_order_of_rooms_is_the_one_that_imports_keep():
    words = read_page(ROOT / "recr1/README.md").split()
    assert " ".join(test_layout.ROOMS) in " ".join(words)


def list_imported_rooms() -> dict[str, set[str]]:
    """List room -> the rooms that its files import."""
    modules = test_layout.list_modules()
    imported = {}
    for name, path in modules.items():
        if "." not in name:
            continue
        room = test_layout.name_room(name)
        imported.setdefault(room, set())
        for target in test_layout.list_imports(name, path, modules):
            imported[room].add(test_layout.name_room(target))
    return imported


def test_the_table_of_rooms_has_the_imports_that_are_there():
    imported = list_imported_rooms()
    text = read_page(ROOT / "recr1/README.md")
    rows = re.findall(r"^\| \[(\w+)\]\(.*?\) \| (.*?) \|", text, re.MULTILINE)
    rooms = {room for room, _ in rows}
    assert len(rooms) >= 15
    for room, cell in rows:
        if room in ("training", "commands"):  # they import nearly everything
            continue
        named = set(re.findall(r"\w+", cell))
        assert named - {"nothing"} == imported[room] - {room}, room


def test_the_main_readme_is_short():
    lines = read_page(ROOT / "README.md").splitlines()
    assert len(lines) <= 250
    for line in lines:
        assert len(line) <= 120


# --- links and paths ---------------------------------------------------------------------------


def list_anchors(page: Path) -> set[str]:
    """List the anchors that GitHub makes of a page's headings."""
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", read_prose(page), re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", heading.lower()).strip()
        anchors.add(words.replace(" ", "-"))
    return anchors


def is_broken(link: str, page: Path) -> bool:
    path, _, anchor = link.partition("#")
    target = page
    if path:
        target = (page.parent / path).resolve()
    if not target.exists():
        return True
    return bool(anchor) and anchor not in list_anchors(target)


def list_broken_links(page: Path) -> list[str]:
    """List the links of a page to a file or a heading that is not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
        is_address = re.match(r"https?:", link)
        if not is_address and is_broken(link, page):
            broken.append(link)
    return broken


def test_links_lead_somewhere(page):
    assert not list_broken_links(page)


def test_links_of_the_results_lead_somewhere():
    assert not list_broken_links(ROOT / "experiments/RESULTS.md")


def is_path(text: str) -> bool:
    """Say whether a text in backticks is a path that the repository should hold."""
    if not re.fullmatch(r"[\w.\-/]+", text):
        return False
    if PLACEHOLDER.search(text):
        return False
    if text in OF_A_USER or text == "__init__.py":
        return False
    first = text.split("/")[0]
    if first in OF_A_RUN:
        return False
    if first in TOP and "/" in text:
        return True
    return Path(text).suffix in CHECKED_SUFFIXES


def exists_near(text: str, page: Path) -> bool:
    # Test files have unique names; what configs share is in a folder of theirs.
    if re.fullmatch(r"test_\w+\.py", text):
        return any((ROOT / "tests").rglob(text))
    experiments = ROOT / "experiments"
    bases = (page.parent, ROOT, experiments, experiments / "configs")
    return any((base / text).exists() for base in bases)


def test_paths_in_backticks_exist(page):
    paths = [text for text in list_backticks(page) if is_path(text)]
    missing = [path for path in paths if not exists_near(path, page)]
    assert not missing


def test_the_configs_of_the_table_are_those_that_are_there():
    experiments = ROOT / "experiments"
    text = read_page(experiments / "README.md")
    _, below_heading = text.split("| config | folder | what |\n|---|---|---|\n")
    table, _, _ = below_heading.partition("\n\n")

    named = []
    for row in table.splitlines():
        names, folder, _ = row.split(" | ")
        place = experiments
        if folder != "here":
            place = experiments / folder.strip("`")
        for name in re.findall(r"`([^`]+)`", names):
            named.append(place / f"{name}.yaml")

    configs = [experiments / "quickstart.yaml"]
    for folder in ("cpu", "rec_r1", "recllm_r1"):
        configs += (experiments / "configs" / folder).glob("*.yaml")
    assert sorted(named) == sorted(configs)


# --- commands ----------------------------------------------------------------------------------


def list_commands(page: Path) -> list[list[str]]:
    """List the words of every command of a page: in its fences and in backticks."""
    lines = list_backticks(page)
    for language, content in list_fences(page):
        if language in ("", "bash"):
            lines += re.split("[\n;]", content)
    commands = []
    for line in lines:
        command = line.strip().removeprefix("$ ").removeprefix("do ")
        program = command.split(" ")[0]
        if program in PROGRAMS:
            words = shlex.split(command, comments=True)
            commands.append(words)
    return commands


def list_flags(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("--")]


def check_file(path: str, flags: list[str]) -> str | None:
    """Say what is wrong with a script and its flags; None: nothing."""
    file = ROOT / path
    if PLACEHOLDER.search(path):
        return None if file.parent.is_dir() else f"no folder of {path}"
    if not file.is_file():
        return f"no file {path}"
    if file.suffix != ".py":
        return None
    source = read_page(file)
    if path.startswith("experiments/prepare/"):  # whose command line is made there
        source += read_page(ROOT / "experiments/prepare/writing.py")
    for flag in flags:
        if f'"{flag}"' not in source:
            return f"{path} has no {flag}"
    return None


def has_setting(key: str) -> bool:
    try:
        get_value(Config(), key)
    except AttributeError:
        return False
    return True


def check_overrides(words: list[str]) -> str | None:
    """Say which a.b=value names no setting; None: all do."""
    for word in words:
        key, _, _ = word.partition("=")
        is_override = re.match(r"[a-z]\w*\.\w+=", word)
        if is_override and word != "a.b=value" and not has_setting(key):
            return f"no setting {word}"
    return None


def check_recr1(words: list[str]) -> str | None:
    """Say what the command's own parser refuses; a command's bare name only has to be one."""
    words = [word.strip("[]") for word in words]
    if words[0] in ("...", "COMMAND"):
        return None
    words = ["1" if word in ("N", "K") else word for word in words]
    if len(words) == 1:
        words.append("--help")
    parser = cli.build_parser()
    try:
        _, rest = parser.parse_known_args(words)
    except SystemExit as error:
        return None if error.code == 0 else "is refused by the parser"
    for word in rest:
        if "=" not in word:
            return f"no argument {word}"
    return check_overrides(rest)


def find_missing_file(words: list[str]) -> str | None:
    """Find the first config or script among a command's words that is not there."""
    for word in words:
        if not re.search(r"\.(yaml|py)$", word) or "=" in word:
            continue
        if PLACEHOLDER.search(word) or word in OF_A_USER:
            continue
        if not (ROOT / word).exists():
            return word
    return None


def check_module(words: list[str]) -> str | None:
    """Say what is wrong with the words behind `python -m`; None: nothing."""
    module, *rest = words
    if module == "recr1.cli":
        return check_recr1(rest) if rest else None
    if not is_module(module):
        return f"no module {module}"
    missing_file = find_missing_file(rest)
    if missing_file:
        return f"no file {missing_file}"
    flags = list_flags([word.strip("[]") for word in rest])
    known_flags = {"--run", "--json"} if module == "recr1.doctor" else {"--dry-run"}
    if set(flags) - known_flags:
        return f"{module} has no {flags}"
    return check_overrides(rest)


@cache
def is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_command(words: list[str]) -> str | None:
    """Say what a command names that is not there; None: nothing."""
    program, *rest = words
    if not rest:
        return None
    if program == "recr1":
        return check_recr1(rest)
    if program in ("python", "torchrun") and "-m" in rest:
        behind_m = rest.index("-m") + 1
        return check_module(rest[behind_m:])
    script = r"/|\.(py|sh)$" if program == "bash" else r"\.py$"
    paths = [word for word in rest if re.search(script, word)]
    if not paths:
        return None if program == "torchrun" else "names no file"
    return check_file(paths[0], list_flags(rest))


def test_commands_name_files_and_flags_that_exist(page, capsys):
    wrong = []
    for words in list_commands(page):
        error = check_command(words)
        if error:
            wrong.append((" ".join(words), error))
    assert not wrong


WRONG_COMMANDS = (
    "bash experiments/quickstarts.sh",
    "python experiments/prepare/msrd.py --outer DIR",
    "python -m recr1.training_loop X.yaml",
    "python -m recr1.train X.yaml loss.kid=1",
    "python -m recr1.train experiments/quick.yaml",
    "python -m recr1.doctor --jason",
    "recr1 plan CONFIG.yaml --gpus N",
    "recr1 explains --run RUN --step K",
    "recr1 report RUN --inn F",
)


def test_wrong_commands_are_found(capsys):
    """The check itself: each of WRONG_COMMANDS has something that is not there."""
    right_command = "python experiments/prepare/NAME.py --out DIR"
    assert check_command(right_command.split()) is None
    for command in WRONG_COMMANDS:
        assert check_command(command.split()), command


# --- settings and imports ----------------------------------------------------------------------


def test_settings_in_backticks_exist(page):
    sections = "|".join(Config.__dataclass_fields__)
    setting = re.compile(rf"(?:{sections})\.[a-z_]+(?=$|[=:])")
    unknown = set()
    for text in list_backticks(page):
        match = setting.match(text)
        if match is None:
            continue
        key = match[0]
        is_file = Path(key).suffix in CHECKED_SUFFIXES  # run.sh
        if is_file or key in OF_A_CONFIG:
            continue
        if not has_setting(key):
            unknown.add(key)
    assert not unknown


def check_imports(content: str) -> None:
    """Check that every name that an example imports from recr1 is there."""
    for node in ast.walk(ast.parse(content)):
        if not isinstance(node, ast.ImportFrom):
            continue
        if not node.module.startswith("recr1"):
            continue
        source = importlib.import_module(node.module)
        for alias in node.names:
            is_inside = hasattr(source, alias.name)
            assert is_inside or is_module(f"{node.module}.{alias.name}"), alias.name


def test_imports_of_the_examples_exist(page):
    for language, content in list_fences(page):
        if language == "python":
            check_imports(content)


def test_each_stop_names_what_it_makes_fast_in_plain():
    """recr1/README.md says it in the form "In plain.py: `name`", or that plain.py uses the same."""
    page = read_page(ROOT / "recr1/README.md")
    start = page.index("## Ten stops")
    end = page.index("## What flows")
    stops = re.split(r"^\d+\. ", page[start:end], flags=re.MULTILINE)[1:]
    source = read_page(ROOT / "recr1/plain.py")
    functions = set(re.findall(r"^def (\w+)", source, re.MULTILINE))

    assert len(stops) == 10
    for stop in stops:
        assert "plain.py" in stop, stop
        _, _, sentence = stop.partition("plain.py:")
        for name in re.findall(r"`(\w+)`", sentence):
            assert name in functions, name
