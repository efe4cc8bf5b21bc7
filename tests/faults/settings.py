"""Wrong settings, in the config and in the files that it names. Makes n faults."""

import dataclasses
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import yaml
from alone import Bench, Case, each, expect, refused, spread
from inputs import new_id
from world import Outcome, World, result

from recr1 import train
from recr1.config.loader import MINIMUMS
from recr1.config.schema import Config


def settings(world: World, n: int) -> Iterator[Outcome]:
    """Wrong settings of a key drawn at random: refused by name before the run has a folder."""
    bench = Bench(world, "settings")
    makers = [
        _unknown_key,
        _unknown_section,
        _wrong_type,
        _on,
        _number_as_text,
        _outside,
        _object,
        _too_small,
        partial(_another_file, key="base"),
        partial(_another_file, key="prompt.file"),
    ]
    return each(world, spread(world.rng, n, [partial(make, bench) for make in makers]))


def fields(kind=None) -> dict[str, type]:
    """{section.key: type} of the config, or of one type of them."""
    found = {
        f"{section.name}.{f.name}": typing.get_type_hints(part)[f.name]
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(part := typing.get_type_hints(Config)[section.name])
        for f in dataclasses.fields(part)
    }
    return {key: t for key, t in found.items() if kind in (None, t)}


def _refused(
    bench: Bench, where: str, key: str, value: object, *names: str, folder: Path | None = None
) -> Case:
    """The setting written into a file of its own, in `folder`; value: as YAML, or the text after
    the colon. names: what the line must hold.
    """

    def case():
        argv, run = bench.argv()
        tree = yaml.safe_load(open(argv[0], encoding="utf-8"))
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = "HERE" if isinstance(value, str) else value
        path = (folder or bench.folder) / f"{run.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(tree).replace("HERE", str(value)), encoding="utf-8")
        refused(train.main, [path, *(a for a in argv[1:] if not a.startswith(f"{key}="))], *names)
        expect(not run.exists(), f"{run} was made before the setting was looked at")

    return f"{where}: {key}", case


def _unknown_key(bench: Bench) -> Case:
    key = bench.rng.choice(sorted(fields()))
    at = bench.rng.randrange(key.index(".") + 1, len(key))
    typo = key[:at] + bench.rng.choice("xqzj_") + key[at:]
    return _refused(bench, "unknown key", typo, 1, typo)


def _unknown_section(bench: Bench) -> Case:
    return _refused(
        bench,
        "unknown section",
        bench.rng.choice(["trian.steps", "rewards.bonus", "sampler.top_p", "__class__.x"]),
        1,
        "unknown key",
    )


def _wrong_type(bench: Bench) -> Case:
    kind, wrong = bench.rng.choice(
        [(int, [1.5, True, [3], {}]), (float, [True, [], {}]), (bool, [1, 0.0, []])]
    )
    key = bench.rng.choice(sorted(fields(kind)))
    return _refused(bench, f"no {kind.__name__}", key, bench.rng.choice(wrong), key)


def _on(bench: Bench) -> Case:
    """YAML 1.1 reads on, off, yes and no as booleans."""
    key = bench.rng.choice(sorted(fields(str)))
    return _refused(
        bench, "on for a text", key, bench.rng.choice(["on", "off", "yes", "No"]), key, "found bool"
    )


def _number_as_text(bench: Bench) -> Case:
    """1e-3 is a text in YAML 1.1; it is meant as a number and taken as one."""

    def case():
        want, (_, run) = (
            bench.result(),
            bench.run(
                None, "optimizer.lr=1e-3", "loss.kl_coef=1e-2", "optimizer.weight_decay='0e0'"
            ),
        )
        expect(result(run) == want, "the run is another one than with 0.001")

    return "1e-3", case


def _outside(bench: Bench) -> Case:
    key = bench.rng.choice(
        [
            "model.path",
            "data.train_queries",
            "data.train_qrels",
            "data.test_queries",
            "data.test_qrels",
        ]
    )
    return _refused(bench, "../../x", key, f"../../{new_id(bench.rng)}", "../../")


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


def _another_file(bench: Bench, key: str) -> Case:
    """base and prompt.file."""
    bad = bench.rng.choice(sorted(FILES))
    content, says = FILES[bad]
    folder = bench.folder / f"{key} {bad}"
    folder.mkdir(parents=True, exist_ok=True)
    if content is not None:
        (folder / "other.yaml").write_bytes(content)
    return _refused(
        bench,
        bad,
        key,
        "other.yaml",
        says,
        *([] if "key" in bad or "code" in bad else ["other.yaml"]),
        folder=folder,
    )


def _object(bench: Bench) -> Case:
    made = bench.folder / "executed"
    key = bench.rng.choice(sorted(fields()))
    name, case = _refused(
        bench,
        "python/object",
        key,
        f"!!python/object/apply:os.system ['touch {made}']",
        "not readable as YAML",
    )

    def watched():
        case()
        expect(not made.exists(), "the object's code was executed")

    return name, watched


def _too_small(bench: Bench) -> Case:
    key = bench.rng.choice(sorted(MINIMUMS))
    value = MINIMUMS[key] - bench.rng.randrange(1, 100)
    return _refused(
        bench,
        "too small",
        key,
        float(value) if fields()[key] is float else value,
        key,
        "must be at least",
    )
