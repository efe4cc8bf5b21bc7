"""LoRA against PEFT: logits, gradients, steps of AdamW, and folders in both directions."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.tiny_world import (
    FAMILIES,
    oracle,
    refused,
    save,
    tiny_model,
    tiny_tokenizer,
    write_yaml,
)
from peft import (
    LoraConfig as PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from test_decoder import compute_our_logits, compute_their_logits, draw_prompts, measure_gap
from transformers import AutoModelForCausalLM

from recr1.config.schema import ConfigError, LoraConfig
from recr1.distributed.fsdp import unsharded
from recr1.model.adapter_folder import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    AdapterFolder,
    save_adapter,
)
from recr1.model.decoder import Decoder
from recr1.model.lora import (
    AdapterSource,
    FrozenReference,
    add_adapters,
    choose_targets,
    compute_scale,
    draw_adapter_weight,
    is_adapter_weight,
    list_block_linears,
    merge_adapters,
)
from recr1.training.load_model import load_policy, save_policy
from recr1.utils.hf_hub import ModelFolderError

RANK = 3
CONFIGS = {
    "all weights": LoraConfig(rank=RANK, alpha=12.0),
    "rslora, q and v": LoraConfig(rank=RANK, alpha=12.0, rslora=True, targets="q_proj, v_proj"),
    "one block's MLP, a half alpha": LoraConfig(
        rank=RANK, alpha=4.5, targets="model.layers.1.mlp.*"
    ),
}
ATTENTION = "model.layers.0.self_attn"


def make_adapted(config: LoraConfig, **shape) -> Decoder:
    """Make a tiny model in float64 whose adapters are drawn, B too; only they are trained."""
    decoder = tiny_model(1, **shape)
    add_adapters(decoder, config)
    generator = torch.Generator().manual_seed(2)
    for name, weight in decoder.named_parameters():
        weight.requires_grad_(is_adapter_weight(name))
        if is_adapter_weight(name):
            weight.data.normal_(0, 0.2, generator=generator)
    return decoder.double()


def get_adapters(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in decoder.named_parameters() if is_adapter_weight(name)}


def write_adapter(decoder: Decoder, config: LoraConfig, folder) -> str:
    source = AdapterSource(config, "base")
    save_adapter(
        folder, get_adapters(decoder).items(), source, list(list_block_linears(tiny_model(1)))
    )
    return str(folder)


def make_peft_twin(decoder: Decoder, config: LoraConfig, folder, **shape) -> Decoder:
    """Put PEFT's layers beside the same weights, and load our adapter by PEFT.

    Beside our own decoder: transformers' norms compute in float32 whatever the model's type is.
    """
    path = write_adapter(decoder, config, folder)
    base = tiny_model(1, **shape).double().requires_grad_(False)
    theirs = inject_adapter_in_model(PeftConfig.from_pretrained(path), base)
    result = set_peft_model_state_dict(theirs, load_peft_weights(path))
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora" in name]
    for name, weight in theirs.named_parameters():
        weight.requires_grad_("lora_" in name)  # as written, an adapter is for inference
    return theirs


def get_peft_adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return PEFT's trained weights by our names."""
    weights = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weights[name.removeprefix(PREFIX).replace(".default.", ".")] = weight
    return weights


def compute_loss(logits: list[torch.Tensor]) -> torch.Tensor:
    """Compute something that every logit counts in."""
    return sum(row.log_softmax(-1).square().mean() for row in logits)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_three_steps_are_pefts(family, config, tmp_path):
    shape = FAMILIES[family]
    ours = make_adapted(config, **shape)
    theirs = make_peft_twin(ours, config, tmp_path / "adapter", **shape)
    prompts = draw_prompts(0)
    our_weights = get_adapters(ours)
    their_weights = get_peft_adapters(theirs)
    optimizers = []
    for weights in (our_weights, their_weights):
        optimizers.append(torch.optim.AdamW(weights.values(), lr=1e-2))

    assert our_weights.keys() == their_weights.keys()
    for step in range(3):
        with torch.enable_grad():
            our_logits = compute_our_logits.__wrapped__(ours, prompts)
            their_logits = compute_our_logits.__wrapped__(theirs, prompts)
        if step == 0:
            assert measure_gap(our_logits, their_logits) < 1e-12
        compute_loss(our_logits).backward()
        compute_loss(their_logits).backward()
        for name, weight in our_weights.items():
            gradient = their_weights[name].grad
            error = (weight.grad - gradient).norm() / gradient.norm()
            assert error < (1e-12 if step == 0 else 1e-9), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for name, weight in our_weights.items():
        error = (weight - their_weights[name]).norm() / weight.norm()
        assert error < 1e-9, name
    assert all(
        weight.grad is None for name, weight in ours.named_parameters() if "lora" not in name
    )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_merged_model_is_pefts_merge(config, tmp_path):
    ours = make_adapted(config)
    theirs = make_peft_twin(ours, config, tmp_path / "adapter")
    for name, module in list(theirs.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent_name, _, attribute = name.rpartition(".")
            setattr(theirs.get_submodule(parent_name), attribute, module.get_base_layer())
    theirs = theirs.state_dict()
    trained_first = sorted(ours.named_parameters(), key=lambda item: not is_adapter_weight(item[0]))

    merged = dict(merge_adapters(trained_first, compute_scale(config)))

    plain = tiny_model(1).state_dict()
    assert merged.keys() == plain.keys()
    changed = set()
    for name, weight in merged.items():
        assert (weight - theirs[name]).abs().max() < 1e-14, name
        if not weight.equal(plain[name].double()):
            changed.add(name.removesuffix(".weight"))
    assert changed == set(choose_targets(list(list_block_linears(tiny_model(1))), config.targets))


def test_an_adapter_of_pefts_loads_in_ours(tmp_path):
    base = tiny_model(1, tie_word_embeddings=True)
    save(base, tmp_path / "base")
    settings = PeftConfig(r=RANK, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    theirs = get_peft_model(oracle(base), settings).eval()
    generator = torch.Generator().manual_seed(3)
    for weight in get_peft_adapters(theirs).values():
        weight.data.normal_(0, 0.2, generator=generator)
    theirs.save_pretrained(tmp_path / "adapter")
    config = LoraConfig(rank=RANK, alpha=6.0, targets="q_proj, down_proj")
    source = AdapterSource(config, "base", str(tmp_path / "adapter"))
    prompts = draw_prompts(1)

    ours = load_policy(str(tmp_path / "base"), 394, torch.float32, adapter=source)

    with unsharded(ours):
        ours.decoder.reachable = base.config.vocab_size
        gap = measure_gap(compute_our_logits(ours, prompts), compute_their_logits(theirs, prompts))
    assert gap < 2e-4
    assert ours.num_trained == sum(w.numel() for w in get_peft_adapters(theirs).values())


def test_our_adapter_and_our_merged_folder_load_in_peft_and_transformers(tmp_path):
    """What a user does with a finished run: float32, transformers' model."""
    config = CONFIGS["all weights"]
    save(tiny_model(1), tmp_path / "base")
    ours = make_adapted(config).float()
    path = write_adapter(ours, config, tmp_path / "adapter")
    prompts = draw_prompts(2)

    theirs = PeftModel.from_pretrained(oracle(tiny_model(1)), path).eval()
    source = AdapterSource(config, "base", path)
    policy = load_policy(str(tmp_path / "base"), 394, torch.float32, adapter=source)
    save_policy(policy, tiny_tokenizer(), frozenset([5]), tmp_path / "out/model", "")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").eval()

    want = compute_our_logits(ours, prompts)
    assert measure_gap(want, compute_their_logits(theirs, prompts)) < 2e-4
    assert measure_gap(want, compute_their_logits(merged, prompts)) < 2e-4
    unloaded = theirs.merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert (weight - unloaded[name]).abs().max() < 1e-6, name
    again = AdapterFolder(str(tmp_path / "out/adapter"))
    for name, weight in get_adapters(ours).items():
        assert again[name].equal(weight)


def test_a_new_adapter_is_the_model_itself_and_the_same_on_any_rank():
    decoder = tiny_model(1)
    prompts = draw_prompts(0)
    before = compute_our_logits(decoder, prompts)
    add_adapters(decoder, CONFIGS["all weights"])
    for name, weight in get_adapters(decoder).items():
        weight.data = draw_adapter_weight(name, weight.shape, seed=0)

    after = compute_our_logits(decoder, prompts)

    assert measure_gap(before, after) == 0
    A = decoder.get_parameter(f"{ATTENTION}.q_proj.lora_A.weight").detach()
    assert A.abs().max() <= 48**-0.5
    assert A.std() == pytest.approx(48**-0.5 / 3**0.5, rel=0.2)
    assert A.equal(draw_adapter_weight(f"{ATTENTION}.q_proj.lora_A.weight", A.shape, seed=0))
    assert not A.equal(draw_adapter_weight(f"{ATTENTION}.q_proj.lora_A.weight", A.shape, seed=1))
    assert not A.equal(draw_adapter_weight(f"{ATTENTION}.k_proj.lora_A.weight", A.shape, seed=0))


def test_the_reference_is_the_model_without_adapters():
    decoder = make_adapted(CONFIGS["all weights"])
    prompts = draw_prompts(0)
    plain = compute_our_logits(tiny_model(1).double(), prompts)

    reference = compute_our_logits(FrozenReference(decoder), prompts)
    policy = compute_our_logits(decoder, prompts)

    assert measure_gap(reference, plain) == 0
    assert measure_gap(policy, plain) > 0.1


def test_frozen_weights_are_held_in_the_compute_type_and_adapters_in_float32(tmp_path):
    base = tiny_model(1)
    save(base, tmp_path / "base")
    source = AdapterSource(CONFIGS["all weights"], "base")

    policy = load_policy(str(tmp_path / "base"), 394, torch.bfloat16, adapter=source)

    num_frozen = 0
    for group in policy.units:
        is_trained = group.shard.requires_grad
        assert group.shard.dtype == (torch.float32 if is_trained else torch.bfloat16)
        assert all(
            is_adapter_weight(weight.name) == is_trained for weight in group.flat_param.weights
        )
        num_frozen += not is_trained
    assert num_frozen == 1 + base.config.num_hidden_layers  # the root, and each block
    assert policy.size - policy.num_trained == sum(w.numel() for w in base.parameters())


def test_at_full_width_the_first_gradient_is_full_fine_tunings():
    """d B = s d W A^T: with an invertible A, no direction of d W is lost."""
    width = 48
    config = LoraConfig(rank=width, alpha=2.0 * width, targets="model.layers.0.self_attn.q_proj")
    adapted = make_adapted(config)
    adapted.get_parameter(f"{ATTENTION}.q_proj.lora_B.weight").data.zero_()
    full = tiny_model(1).double()
    prompts = draw_prompts(0)

    compute_loss(compute_our_logits.__wrapped__(adapted, prompts)).backward()
    compute_loss(compute_our_logits.__wrapped__(full, prompts)).backward()

    A = adapted.get_parameter(f"{ATTENTION}.q_proj.lora_A.weight")
    d_B = adapted.get_parameter(f"{ATTENTION}.q_proj.lora_B.weight").grad
    d_W = full.get_parameter(f"{ATTENTION}.q_proj.weight").grad
    recovered = torch.linalg.solve(A.detach(), (d_B / compute_scale(config)).T).T
    assert (recovered - d_W).norm() / d_W.norm() < 1e-10


@pytest.mark.parametrize(
    "targets, words",
    [
        ("q_proj, qproj", "'qproj' fits no weight of a block; they are called q_proj, k_proj"),
        ("lm_head", "'lm_head' fits no weight"),
        (" , ", "is empty"),
    ],
)
def test_unknown_targets_are_named(targets, words):
    with pytest.raises(ConfigError, match="lora.targets") as caught:
        add_adapters(tiny_model(), LoraConfig(rank=2, targets=targets))
    assert words in str(caught.value)


def test_a_rank_above_a_weights_width_is_refused():
    with pytest.raises(ConfigError, match=r"lora.rank: 25 is more than .*k_proj has"):
        add_adapters(tiny_model(), LoraConfig(rank=25, targets="k_proj"))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(peft_type="IA3"), "not LORA"),
        (dict(use_dora=True), "use_dora is True"),
        (dict(rank_pattern={"q_proj": 4}), "rank_pattern"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(r="eight"), "not two numbers"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(change, words, tmp_path):
    config = CONFIGS["all weights"]
    path = write_adapter(make_adapted(config), config, tmp_path / "adapter")
    tree = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(tree | change))

    with pytest.raises(ModelFolderError, match=words):
        AdapterFolder(path)


def test_an_adapter_of_other_settings_or_weights_says_what_to_set(tmp_path):
    config = CONFIGS["rslora, q and v"]
    decoder = make_adapted(config)
    folder = AdapterFolder(write_adapter(decoder, config, tmp_path / "adapter"))
    shapes = {name: tuple(weight.shape) for name, weight in get_adapters(decoder).items()}

    folder.check(AdapterSource(config, ""), shapes)
    with pytest.raises(ConfigError, match="set lora.rank=3 lora.rslora=true"):
        folder.check(AdapterSource(replace(config, rank=4, rslora=False), ""), shapes)
    shapes.popitem()
    with pytest.raises(ModelFolderError, match="1 weights are missing, unknown"):
        folder.check(AdapterSource(config, ""), shapes)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match=f"holds no {CONFIG_FILE}"):
        AdapterFolder(str(tmp_path))
    config = CONFIGS["all weights"]
    path = write_adapter(make_adapted(config), config, tmp_path / "adapter")
    (tmp_path / "adapter" / WEIGHTS_FILE).unlink()
    with pytest.raises(ModelFolderError, match="safe_serialization"):
        AdapterFolder(path)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["lora.targets=q_proj"], "lora.targets: is for LoRA"),
        (["model.adapter=runs/adapter"], "model.adapter: is for LoRA"),
        (["lora.rank=2", "train.frozen='*norm*'"], "train.frozen: with lora.rank"),
        (["lora.rank=2", "loss.reference_cpu_offload=true"], "no second copy"),
        (["lora.rank=2", "model.adapter=a", "loss.kl_coef=0.1"], "merge it first"),
        (["lora.rank=2", "model.adapter=nowhere"], "nowhere: holds no"),
        (["lora.rank=2", "lora.targets=nothing"], "'nothing' fits no weight"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(overrides, words, tmp_path, capsys):
    line = refused([write_yaml(tmp_path), *overrides], capsys)

    assert words in line
    assert not (tmp_path / "run").exists()


def test_unmatched_adapters_are_not_lost_in_silence():
    stray = [("model.layers.9.mlp.up_proj.lora_A.weight", torch.zeros(2, 4))]

    with pytest.raises(ValueError, match="adapters without a weight"):
        list(merge_adapters(stray, 1.0))
