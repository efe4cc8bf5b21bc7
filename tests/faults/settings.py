"""Wrong settings, in the config and in the files that it names. Makes n faults."""

import dataclasses
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml
from alone import Bench, Case, draw_cases, expect, expect_refusal, run_cases
from inputs import draw_id
from world import Outcome, World, read_result

from recr1 import train
from recr1.config.loader import MINIMUMS
from recr1.config.schema import Config


def spoil_settings(world: World, n: int) -> Iterator[Outcome]:
    """Set a key drawn at random wrongly: it is refused by name before the run has a folder."""
    bench = Bench(world, "settings")
    makers = [partial(make, bench) for make in MAKERS]
    cases = draw_cases(world.rng, n, makers)
    return run_cases(world, cases)


def find_keys(kind: type | None = None) -> dict[str, type]:
    """Return {section.key: type} of the config, or of one type of them."""
    types = {}
    for section, section_type in typing.get_type_hints(Config).items():
        if not dataclasses.is_dataclass(section_type):
            continue
        for key, key_type in typing.get_type_hints(section_type).items():
            types[f"{section}.{key}"] = key_type
    return {key: key_type for key, key_type in types.items() if kind in (None, key_type)}


def draw_key(rng, kind: type | None = None) -> str:
    return rng.choice(sorted(find_keys(kind)))


def refuse_value(
    bench: Bench, where: str, key: str, value: object, *names: str, folder: Path | None = None
) -> Case:
    """The setting written into a file of its own, in `folder`; value: as YAML, or the text after
    the colon. names: what the line must hold.
    """

    def check():
        argv, run = bench.make_argv()
        config, *settings = argv
        path = (folder or bench.folder) / f"{run.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        write_config(config, path, key, value)
        others = [setting for setting in settings if not setting.startswith(f"{key}=")]
        expect_refusal(train.main, [path, *others], *names)
        expect(not run.exists(), f"{run} was made before the setting was looked at")

    return f"{where}: {key}", check


def write_config(config: str, path: Path, key: str, value: object) -> None:
    """Write the config with the key at this value to path."""
    text = Path(config).read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    if isinstance(value, str):
        node[last] = "HERE"
    text = yaml.safe_dump(tree).replace("HERE", str(value))
    path.write_text(text, encoding="utf-8")


def misspell_key(bench: Bench) -> Case:
    key = draw_key(bench.rng)
    position = bench.rng.randrange(key.index(".") + 1, len(key))
    letter = bench.rng.choice("xqzj_")
    typo = key[:position] + letter + key[position:]
    return refuse_value(bench, "unknown key", typo, 1, typo)


UNKNOWN = ["trian.steps", "rewards.bonus", "sampler.top_p", "__class__.x"]


def misspell_section(bench: Bench) -> Case:
    key = bench.rng.choice(UNKNOWN)
    return refuse_value(bench, "unknown section", key, 1, "unknown key")


WRONG_VALUES = [
    (int, [1.5, True, [3], {}]),
    (float, [True, [], {}]),
    (bool, [1, 0.0, []]),
]


def change_type(bench: Bench) -> Case:
    kind, values = bench.rng.choice(WRONG_VALUES)
    key = draw_key(bench.rng, kind)
    value = bench.rng.choice(values)
    return refuse_value(bench, f"no {kind.__name__}", key, value, key)


def write_on(bench: Bench) -> Case:
    """YAML 1.1 reads on, off, yes and no as booleans."""
    key = draw_key(bench.rng, str)
    word = bench.rng.choice(["on", "off", "yes", "No"])
    return refuse_value(bench, "on for a text", key, word, key, "found bool")


def write_number_as_text(bench: Bench) -> Case:
    """1e-3 is a text in YAML 1.1; it is meant as a number and taken as one."""
    texts = ("optimizer.lr=1e-3", "loss.kl_coef=1e-2", "optimizer.weight_decay='0e0'")

    def check():
        want = bench.run_undisturbed()
        _, run = bench.run(None, *texts)
        expect(read_result(run) == want, "the run is another one than with 0.001")

    return "1e-3", check


PATHS = [
    "model.path",
    "data.train_queries",
    "data.train_qrels",
    "data.test_queries",
    "data.test_qrels",
]


def lead_outside(bench: Bench) -> Case:
    key = bench.rng.choice(PATHS)
    path = f"../../{draw_id(bench.rng)}"
    return refuse_value(bench, "../../x", key, path, "../../")


FILES = {  # what stands in a file that the config names: (its bytes, what the line says)
    "not there": (None, "no such file"),
    "a list": (b"- a\n", "expected `key: value` lines"),
    "cut": (b"a: [1, ", "not readable as YAML"),
    "not UTF-8": (b"a: \xff", "not readable as YAML"),
    "an object": (b"a: !!python/name:os.system ''", "not readable as YAML"),
    "no date": (b"a: 2024-13-45", "not readable as YAML"),
    "nested": (b"a: " + b"[" * 10_000, "not readable as YAML"),
    "digits": (b"a: " + b"9" * 5_000, "not readable as YAML"),
    "another key": (b"\xef\xbb\xbfno_such_key: 1", "no_such_key"),
    "a code of the terminal": (b'"\\e[2J": 1', "unknown key"),
}


def spoil_file(bench: Bench, key: str) -> Case:
    """The file of base or prompt.file."""
    bad = bench.rng.choice(sorted(FILES))
    content, says = FILES[bad]
    folder = bench.folder / f"{key} {bad}"
    folder.mkdir(parents=True, exist_ok=True)
    if content is not None:
        (folder / "other.yaml").write_bytes(content)
    names = [says]
    if "key" not in bad and "code" not in bad:
        names.append("other.yaml")
    return refuse_value(bench, bad, key, "other.yaml", *names, folder=folder)


def write_object(bench: Bench) -> Case:
    trace = bench.folder / "executed"
    key = draw_key(bench.rng)
    value = f"!!python/object/apply:os.system ['touch {trace}']"
    where, check = refuse_value(bench, "python/object", key, value, "not readable as YAML")

    def check_trace():
        check()
        expect(not trace.exists(), "the object's code was executed")

    return where, check_trace


def go_below_minimum(bench: Bench) -> Case:
    key = bench.rng.choice(sorted(MINIMUMS))
    value = MINIMUMS[key] - bench.rng.randrange(1, 100)
    if find_keys()[key] is float:
        value = float(value)
    return refuse_value(bench, "too small", key, value, key, "must be at least")


MAKERS = (
    misspell_key,
    misspell_section,
    change_type,
    write_on,
    write_number_as_text,
    lead_outside,
    write_object,
    go_below_minimum,
    partial(spoil_file, key="base"),
    partial(spoil_file, key="prompt.file"),
)
