"""Every wrong setting is one ConfigError that names the key."""

from pathlib import Path

import pytest
import yaml

from recr1.config.loader import dump_config, get_value, load_config, load_run_config
from recr1.config.schema import Config, ConfigError
from recr1.utils.renamed import RENAMED_SETTINGS, RENAMED_VALUES

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = str(ROOT / "experiments/quickstart.yaml")


@pytest.fixture
def yaml_file(tmp_path):
    """Return the function text -> path of a config file that holds it; one file, written anew."""

    def write_text(text):
        path = tmp_path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_text


# the text of a config file, and what its error says
BAD_FILES = [
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
    ("model: {kernels: cuda}", "model.kernels: 'cuda' is not one of auto, torch, triton"),
    ("train: {steps: 0}", "train.steps: must be at least 1"),
    ("optimizer: {lr: .nan}", "optimizer.lr: must be a finite number"),
    ("data: {corpus: null}", "data.corpus: expected str"),
    ("loss: {tis_level: word, tis_cap: 2}", "loss.tis_level: 'word' is not one of token, sequence"),
    ("loss: {tis_mode: mask}", "^loss.tis_mode: .* set loss.tis_cap, or leave it out"),
    ("loss: {tis_floor: 0.5, tis_level: sequence}", "^loss.tis_floor, loss.tis_level: .*tis_cap"),
    ("loss: {tis_cap: 1, tis_floor: 2}", "loss.tis_floor: 2 exceeds loss.tis_cap = 1; lower it"),
    (
        "loss: {kl_estimator: k3_unbiased, kl_in: reward, kl_coef: 1}",
        "loss.kl_estimator: k3_unbiased .* set loss.kl_in=loss or loss.kl_estimator=k3",
    ),
    ("loss: {kind: pass_at_k, pass_k: 1}", "loss.pass_k: 1 is not 2 to sampling.group_size = 8"),
    ("loss: {advantage: pass_at_k, pass_k: 9}", "loss.pass_k: 9 is not 2 to"),
    ("loss: {kind: maxrl}", "loss.advantage: maxrl .*; reward.unparsable can make it so"),
    (
        "{loss: {advantage: maxrl}, reward: {unparsable: 0, weights: {ndcg: 1, mrr: -1}}}",
        "maxrl .*; reward.weights mrr can make it so",
    ),
    ("loss: {kind: gdpo}", "gdpo normalizes .* has one, ndcg; add another, or use mean_std"),
    (
        "{loss: {kind: gdpo, kl_coef: 1, kl_in: reward}, reward: {weights: {ndcg: 1, mrr: 1}}}",
        "loss.kl_in: reward .* set loss.kl_in=loss",
    ),
    (
        "{loss: {kind: gdpo}, sampling: {dynamic_sampling: 1}, "
        "reward: {weights: {ndcg: 1, mrr: 1}}}",
        "sampling.dynamic_sampling: .* leave it out",
    ),
    ("- a list", "expected `key: value` lines"),
    ("a: [1", "not readable as YAML"),
    ("task: !!python/object/apply:os.system [ls]", "not readable as YAML"),
    ("run: {seed: 2024-13-45}", "not readable as YAML: month must be"),
    (f"run: {{seed: {'9' * 5000}}}", "not readable as YAML: Exceeds the limit"),
    ("run: " + "[" * 10_000, "not readable as YAML"),
    ('data: {corpus: "a\\0b"}', "data.corpus: 'a.x00b' holds the character 0"),
    ('task: "\\ud83dx"', "task: .* holds the character 0, or half of a character"),
]


@pytest.mark.parametrize("text, message", BAD_FILES)
def test_refused(yaml_file, text, message):
    path = yaml_file(text)

    with pytest.raises(ConfigError, match=message):
        load_config(path, [])


# an override, and what its error says
BAD_OVERRIDES = [
    ("train.steps", "write it as key=value"),
    ("train.step=3", "unknown key train.step"),
    ("task.x=1", "task is not a section"),
    ("train.steps=[", "not YAML"),
    ("run.seed=2024-13-45", "not YAML"),
    ("run.seed=" + "[" * 10_000, "not YAML"),
    ("optimizer.lr=abc", "expected float"),
]


@pytest.mark.parametrize("override, message", BAD_OVERRIDES)
def test_refused_overrides(yaml_file, override, message):
    path = yaml_file("task: product_search")

    with pytest.raises(ConfigError, match=message):
        load_config(path, [override])


@pytest.mark.parametrize("old, new", RENAMED_SETTINGS.items())
def test_a_renamed_key_is_refused_with_its_new_name(yaml_file, old, new):
    path = yaml_file("task: product_search")
    message = f"unknown key {old}: it is called {new} now"

    with pytest.raises(ConfigError, match=message):
        load_config(path, [f"{old}=1"])
    default = get_value(Config(), new)
    assert default is not None


def test_a_renamed_value_is_refused_with_its_new_name(yaml_file):
    path = yaml_file("model: {head: one_shot}")

    with pytest.raises(ConfigError, match="'one_shot' is not .*; it is called fused now"):
        load_config(path, [])


def test_the_config_of_a_run_of_version_0_1_is_read(tmp_path):
    overrides = ["loss.kl_coef=0.5", "loss.agg_mode=seq-mean-token-mean"]
    config = load_config(QUICKSTART, overrides)
    tree = yaml.safe_load(dump_config(config))
    translate_to_old_names(tree)
    tree["model"]["head"] = "one_shot"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")

    assert load_run_config(tmp_path) == config
    with pytest.raises(ConfigError, match="it is called .* now"):
        load_config(str(path), [])


def translate_to_old_names(tree):
    """Give every setting of {section: {key: value}} the key and the value it had in version 0.1."""
    for old_key, new_key in RENAMED_SETTINGS.items():
        section, new_name = new_key.split(".")
        _, old_name = old_key.split(".")
        value = tree[section].pop(new_name)
        for old_value, new_value in RENAMED_VALUES.get(new_key, {}).items():
            if value == new_value:
                value = old_value
                break
        tree[section][old_name] = value


@pytest.mark.parametrize(
    "retriever",
    ["{kind: dense, encoder: e, repeat_terms: once}", "{kind: 'mine:f', repeat_terms: once}"],
)
def test_counting_repeated_terms_once_is_refused_where_it_would_do_nothing(yaml_file, retriever):
    with pytest.raises(ConfigError, match="retriever.repeat_terms: once is for bm25") as e:
        load_config(yaml_file(f"retriever: {retriever}"), [])
    assert "\n" not in str(e.value)


def test_missing_file():
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        load_config("nowhere.yaml", [])


def test_numbers_and_overrides(yaml_file):
    path = yaml_file("optimizer: {lr: 1e-6, eps: 1}")
    overrides = ["optimizer.weight_decay=2e-3", "train.steps=7", "run.dir='a b'"]

    config = load_config(path, overrides)

    assert config.optimizer.lr == 1e-6
    assert config.optimizer.eps == 1.0
    assert config.optimizer.weight_decay == 2e-3
    assert config.train.steps == 7
    assert config.run.dir == "a b"


def test_dump_reads_back_equal(yaml_file):
    config = load_config(QUICKSTART, ["optimizer.betas=[0.5, 0.6]"])

    path = yaml_file(dump_config(config))

    assert load_config(path, []) == config
    assert config != Config()


@pytest.mark.parametrize("text", ["1e-6", "3E-4", "1.5e-3", "0.25", "0"])
def test_a_number_is_a_number_wherever_it_stands(yaml_file, text):
    path = yaml_file(f"optimizer: {{betas: [{text}, 0.5]}}")
    in_a_list = load_config(path, [])
    path = yaml_file("")
    in_an_override = load_config(path, [f"optimizer.lr={text}"])

    from_list = in_a_list.optimizer.betas[0]
    assert from_list == float(text)
    assert in_an_override.optimizer.lr == from_list
    assert isinstance(from_list, float)


# the text of a config file, and what the one line of its error says
MORE_BAD_FILES = [
    ("1: 2", "unknown key 1"),
    ("train:", "train: expected a section"),
    ("train: {steps: 1e3}", "train.steps: expected int, found str"),
    ("sampling: {temperature: .inf}", "sampling.temperature: must be a finite number"),
    ("loss: {kl_coef: .nan}", "loss.kl_coef: must be a finite number"),
    ("sampling: {group_size: 1}", "sampling.group_size: must be at least 2"),
    ("retriever: {repeat_terms: never}", "repeat_terms: 'never' is not one of count, once"),
    ("run: {dir: 3}", "run.dir: expected str, found int"),
    ("a: b: c", "not readable as YAML"),
]


@pytest.mark.parametrize("text, message", MORE_BAD_FILES)
def test_more_that_is_refused_in_one_line(yaml_file, text, message):
    path = yaml_file(text)

    with pytest.raises(ConfigError, match=message) as error:
        load_config(path, [])
    assert "\n" not in str(error.value)


def test_strings_that_look_like_something_else_survive_dump(yaml_file):
    overrides = [
        "model.path='1e-6'",
        "run.dir='yes'",
        "data.corpus='null'",
        "optimizer.lr=1e-7",
        "loss.kl_coef=1e+20",
        "run.seed=-3",
        "prompt.user='é ユ: # {query}'",
        'prompt.system="two\\nlines = 1"',
    ]
    path = yaml_file("")
    config = load_config(path, overrides)

    path = yaml_file(dump_config(config))

    assert config.model.path == "1e-6"
    assert config.prompt.system == "two\nlines = 1"
    assert load_config(path, []) == config
