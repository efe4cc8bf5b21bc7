"""Every wrong setting is one ConfigError that names the key."""

from pathlib import Path

import pytest
import yaml

from recr1.config.loader import dump_config, get_value, load_config, load_run_config
from recr1.config.schema import Config, ConfigError
from recr1.utils.renamed import RENAMED_SETTINGS, RENAMED_VALUES

QUICKSTART = str(Path(__file__).resolve().parents[3] / "experiments" / "quickstart.yaml")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize(
    "text, message",
    [
        ("optimizr: {lr: 1}", "unknown key optimizr: did you mean optimizer"),
        ("optimizer: {learning: 1}", "unknown key optimizer.learning"),
        ("optimizer: {lrr: 1}", r"unknown key optimizer\.lrr: did you mean optimizer\.lr\?"),
        ("train: {steps: '10'}", "train.steps: expected int, found str"),
        ("train: {steps: true}", "train.steps: expected int, found bool"),
        ("train: {steps: 1.5}", "train.steps: expected int, found float"),
        ("optimizer: {lr: fast}", "optimizer.lr: expected float, found str"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: expected a list of 2"),
        ("optimizer: {betas: [0.9, x]}", "optimizer.betas: expected float"),
        ("optimizer: 3", "optimizer: expected a section"),
        ("optimizer: {kind: sgd}", "optimizer.kind: 'sgd' is not one of adamw, muon"),
        ("train: {steps: 0}", "train.steps: must be at least 1"),
        ("optimizer: {lr: .nan}", "optimizer.lr: must be a finite number"),
        ("data: {corpus: null}", "data.corpus: expected str"),
        ("- a list", "expected `key: value` lines"),
        ("a: [1", "not readable as YAML"),
        ("task: !!python/object/apply:os.system [ls]", "not readable as YAML"),
        ("run: {seed: 2024-13-45}", "not readable as YAML: month must be"),
        (f"run: {{seed: {'9' * 5000}}}", "not readable as YAML: Exceeds the limit"),
        ("run: " + "[" * 10_000, "not readable as YAML"),
        ('data: {corpus: "a\\0b"}', "data.corpus: 'a.x00b' holds the character 0"),
        ('task: "\\ud83dx"', "task: .* holds the character 0, or half of a character"),
    ],
)
def test_refused(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(yaml_file(text), [])


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.steps", "write it as key=value"),
        ("train.step=3", "unknown key train.step"),
        ("task.x=1", "task is not a section"),
        ("train.steps=[", "not YAML"),
        ("run.seed=2024-13-45", "not YAML"),
        ("run.seed=" + "[" * 10_000, "not YAML"),
        ("optimizer.lr=abc", "expected float"),
    ],
)
def test_refused_overrides(yaml_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(yaml_file("task: product_search"), [override])


@pytest.mark.parametrize("old, new", RENAMED_SETTINGS.items())
def test_a_renamed_key_is_refused_with_its_new_name(yaml_file, old, new):
    message = f"unknown key {old}: it is called {new} now"

    with pytest.raises(ConfigError, match=message):
        load_config(yaml_file("task: product_search"), [f"{old}=1"])
    assert get_value(Config(), new) is not None


def test_a_renamed_value_is_refused_with_its_new_name(yaml_file):
    with pytest.raises(ConfigError, match="'fused' is not .*; it is called fused now"):
        load_config(yaml_file("model: {head: fused}"), [])


def test_the_config_of_a_run_of_version_0_1_is_read(tmp_path):
    config = load_config(QUICKSTART, ["loss.kl_coef=0.5", "loss.agg_mode=seq-mean-token-mean"])
    tree = yaml.safe_load(dump_config(config))
    old_values = {
        new_key: {new: old for old, new in values.items()}
        for new_key, values in RENAMED_VALUES.items()
    }
    for old_key, new_key in RENAMED_SETTINGS.items():
        section, new_name = new_key.split(".")
        value = tree[section].pop(new_name)
        tree[section][old_key.split(".")[1]] = old_values.get(new_key, {}).get(value, value)
    tree["model"]["head"] = "fused"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")

    assert load_run_config(tmp_path) == config
    with pytest.raises(ConfigError, match="it is called .* now"):
        load_config(str(tmp_path / "config.yaml"), [])


def test_missing_file():
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        load_config("nowhere.yaml", [])


def test_numbers_and_overrides(yaml_file):
    c = load_config(
        yaml_file("optimizer: {lr: 1e-6, eps: 1}"),
        ["optimizer.weight_decay=2e-3", "train.steps=7", "run.dir='a b'"],
    )
    assert (
        c.optimizer.lr,
        c.optimizer.eps,
        c.optimizer.weight_decay,
        c.train.steps,
        c.run.dir,
    ) == (1e-6, 1.0, 2e-3, 7, "a b")


def test_dump_reads_back_equal(yaml_file):
    c = load_config(QUICKSTART, ["optimizer.betas=[0.5, 0.6]"])
    assert load_config(yaml_file(dump_config(c)), []) == c != Config()


@pytest.mark.parametrize("text", ["1e-6", "3E-4", "1.5e-3", "0.25", "0"])
def test_a_number_is_a_number_wherever_it_stands(yaml_file, text):
    from_list = load_config(yaml_file(f"optimizer: {{betas: [{text}, 0.5]}}"), []).optimizer.betas[
        0
    ]
    assert (
        load_config(yaml_file(""), [f"optimizer.lr={text}"]).optimizer.lr
        == from_list
        == float(text)
    )
    assert isinstance(from_list, float)


@pytest.mark.parametrize(
    "text, message",
    [
        ("1: 2", "unknown key 1"),
        ("train:", "train: expected a section"),
        ("train: {steps: 1e3}", "train.steps: expected int, found str"),
        ("sampling: {temperature: .inf}", "sampling.temperature: must be a finite number"),
        ("loss: {kl_coef: .nan}", "loss.kl_coef: must be a finite number"),
        ("sampling: {group_size: 1}", "sampling.group_size: must be at least 2"),
        ("run: {dir: 3}", "run.dir: expected str, found int"),
        ("a: b: c", "not readable as YAML"),
    ],
)
def test_more_that_is_refused_in_one_line(yaml_file, text, message):
    with pytest.raises(ConfigError, match=message) as e:
        load_config(yaml_file(text), [])
    assert "\n" not in str(e.value)


def test_strings_that_look_like_something_else_survive_dump(yaml_file):
    c = load_config(
        yaml_file(""),
        [
            "model.path='1e-6'",
            "run.dir='yes'",
            "data.corpus='null'",
            "optimizer.lr=1e-7",
            "loss.kl_coef=1e+20",
            "run.seed=-3",
            "prompt.user='é ユ: # {query}'",
            'prompt.system="two\\nlines = 1"',
        ],
    )
    assert (c.model.path, c.prompt.system) == ("1e-6", "two\nlines = 1")
    assert load_config(yaml_file(dump_config(c)), []) == c
