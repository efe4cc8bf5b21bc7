"""The packed gradient equals a padded float64 reference: one padded row per sibling, a mask, plain
autograd; no line of it is ours.

Legend: R rollouts, W widest row, H heads, D head dimension, V vocabulary.
"""

import copy

import pytest
import torch
from helpers.tiny_world import FAMILIES, oracle, tiny_config, tiny_model

from recr1.config.schema import LossConfig, ModelConfig
from recr1.data_types import Prompt, Rollout
from recr1.rl.advantages import compute_group_advantages, normalize_by_std
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import deduplicate, pack_rollouts
from recr1.rl.policy_loss import compute_policy_loss
from recr1.train import add_advantages, add_ref_logp

TEMPERATURE = 1.3
CLIP = 0.2
KL = 0.05


def rollouts_of(group_size: int, seed: int = 0) -> list[Rollout]:
    """Make five prompts of unequal length with completions of 1 to 9 tokens; every third sibling
    repeats its elder.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = tiny_config().vocab_size

    def draw_ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        ids = torch.randint(vocab, (length,), generator=generator)
        return tuple(ids.tolist())

    rollouts = []
    for group in range(5):
        prompt = Prompt(f"q{group}", group, "", draw_ids(1, 8))
        ids = ()
        for sibling in range(group_size):
            repeats = sibling % 3 == 2
            if group == 0 and sibling == 0:
                ids = draw_ids(1, 2)
            elif not repeats:
                ids = draw_ids(1, 10)
            logp = (0.0,) * len(ids)
            rollouts.append(Rollout(prompt, group, sibling, ids, logp, True))
    return rollouts


# --- the reference --------------------------------------------------------------------------------


def compute_rope_angles(config, width: int) -> torch.Tensor:
    """Compute the angle (W, D/2) of each position and pair of dimensions."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    # positions per turn
    wave = 2 * torch.pi * config.rope_theta ** (pairs / config.head_dim)
    if config.rope_scaling:
        wave = scale_wavelengths(wave, config.rope_scaling)
    positions = torch.arange(width, dtype=torch.float64)
    return positions[:, None] * 2 * torch.pi / wave


def scale_wavelengths(wave: torch.Tensor, scaling) -> torch.Tensor:
    """Scale RoPE as Meta wrote it for Llama 3.1: three cases by wavelength."""
    short = scaling.original_max_position_embeddings / scaling.high_freq_factor
    long = scaling.original_max_position_embeddings / scaling.low_freq_factor
    turns = scaling.original_max_position_embeddings / wave
    smooth = turns - scaling.low_freq_factor
    smooth = smooth / (scaling.high_freq_factor - scaling.low_freq_factor)

    stretched = scaling.factor * wave
    between = 1 / ((1 - smooth) / stretched + smooth / wave)
    not_short = torch.where(wave > long, stretched, between)
    return torch.where(wave < short, wave, not_short)


def normalize_rms(x, weight, eps):
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return weight * x / (mean_square + eps).sqrt()


def rotate(x, angles):
    low, high = x.chunk(2, -1)
    cos = angles.cos()
    sin = angles.sin()
    turned_low = low * cos - high * sin
    turned_high = high * cos + low * sin
    return torch.cat([turned_low, turned_high], -1)


def project_heads(x, weights, config, name):
    """Compute queries (q), keys (k) or values (v) before the rotation: (R, their heads, W, D)."""
    projected = x @ weights[f"self_attn.{name}_proj.weight"].T
    if config.family == "qwen2":
        projected = projected + weights[f"self_attn.{name}_proj.bias"]
    heads = projected.unflatten(-1, (-1, config.head_dim))
    if config.family == "qwen3" and name != "v":
        norm = weights[f"self_attn.{name}_norm.weight"]
        heads = normalize_rms(heads, norm, config.rms_norm_eps)
    return heads.transpose(1, 2)


def attend(x, weights, config, angles, allowed):
    """Compute causal attention with every key and value head repeated for its queries."""
    repeats = config.num_attention_heads // config.num_key_value_heads
    queries = project_heads(x, weights, config, "q")
    keys = project_heads(x, weights, config, "k").repeat_interleave(repeats, 1)
    values = project_heads(x, weights, config, "v").repeat_interleave(repeats, 1)
    queries = rotate(queries, angles)
    keys = rotate(keys, angles)

    scores = queries @ keys.mT / config.head_dim**0.5
    probs = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    heads = (probs @ values).transpose(1, 2)
    return heads.flatten(2) @ weights["self_attn.o_proj.weight"].T


def apply_mlp(x, weights):
    gate = x @ weights["mlp.gate_proj.weight"].T
    up = x @ weights["mlp.up_proj.weight"].T
    return (gate * gate.sigmoid() * up) @ weights["mlp.down_proj.weight"].T


def select_layer(weights: dict, index: int) -> dict:
    """Select the weights of one layer, named as they are inside of it."""
    prefix = f"model.layers.{index}."
    layer = {}
    for name, weight in weights.items():
        if name.startswith(prefix):
            layer[name.removeprefix(prefix)] = weight
    return layer


def compute_padded_logits(weights: dict, config, tokens, mask) -> torch.Tensor:
    """Compute the logits (R, W, V) of the three families on a padded rectangle, all in float64
    (transformers' own models round norms and rope). tokens, mask: (R, W).
    """
    eps = config.rms_norm_eps
    width = tokens.shape[1]
    angles = compute_rope_angles(config, width)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    # (R, 1, W, W)
    allowed = causal & mask.bool()[:, None, None, :]

    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(config.num_hidden_layers):
        layer = select_layer(weights, index)
        normed = normalize_rms(x, layer["input_layernorm.weight"], eps)
        x = x + attend(normed, layer, config, angles, allowed)
        normed = normalize_rms(x, layer["post_attention_layernorm.weight"], eps)
        x = x + apply_mlp(normed, layer)

    head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    hidden = normalize_rms(x, weights["model.norm.weight"], eps)
    return hidden @ weights[head_name].T


def pad_rows(rollouts) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad each prompt with its completion to (tokens, mask), both (R, W)."""
    rows = [[*r.prompt.ids, *r.ids] for r in rollouts]
    width = max(len(row) for row in rows)
    shape = (len(rows), width)
    tokens = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        length = len(row)
        tokens[i, :length] = torch.tensor(row)
        mask[i, :length] = 1
    return tokens, mask


def compute_padded_logp(weights, config, rollouts):
    """Compute log-probs (R, W - 1) of the rows' tokens and say which belong to completions."""
    tokens, mask = pad_rows(rollouts)
    logits = compute_padded_logits(weights, config, tokens, mask) / TEMPERATURE
    logp = logits.log_softmax(-1)[:, :-1]
    targets = tokens[:, 1:, None]
    target_logp = logp.gather(-1, targets)[..., 0]

    # column t holds the log-prob of token t + 1
    position = torch.arange(1, tokens.shape[1])
    prompt_lengths = torch.tensor([len(r.prompt.ids) for r in rollouts])
    first = prompt_lengths[:, None]
    end = mask.sum(1, keepdim=True)
    return target_logp, (position >= first) & (position < end)


def copy_weights(model) -> dict[str, torch.Tensor]:
    """Copy a model's weights into leaves that collect gradients."""
    weights = {}
    for name, tensor in model.state_dict().items():
        copied = tensor.detach().clone()
        weights[name] = copied.requires_grad_()
    return weights


def reference_gradients(policy, frozen, rollouts, adv, total):
    """Compute GRPO's loss and its gradient by name. adv: (R,); total: trained tokens."""
    weights = copy_weights(policy)
    logp, is_completion = compute_padded_logp(weights, policy.config, rollouts)
    with torch.no_grad():
        ref_logp, _ = compute_padded_logp(frozen.state_dict(), frozen.config, rollouts)

    ratio = (logp - logp.detach()).exp()
    clipped_ratio = ratio.clamp(1 - CLIP, 1 + CLIP)
    column = adv[:, None]
    gain = torch.minimum(ratio * column, clipped_ratio * column)
    difference = ref_logp - logp
    divergence = difference.exp() - difference - 1
    losses = (KL * divergence - gain) * is_completion
    loss = losses.sum() / total
    loss.backward()

    gradients = {name: weight.grad for name, weight in weights.items()}
    return loss.item(), gradients


def padded_cross_entropy(model, texts, mask_prompt, temperature=1.0):
    """Compute SFT's loss and its gradient by name with torch's cross_entropy.

    The rows are padded; what is not learned is at its ignore_index.
    """
    weights = copy_weights(model)
    tokens, mask = pad_rows(texts)
    labels = torch.where(mask.bool(), tokens, -100)
    for row, text in zip(labels, texts, strict=True):
        ignored = len(text.prompt.ids) if mask_prompt else 1
        row[:ignored] = -100

    logits = compute_padded_logits(weights, model.config, tokens, mask)
    logits = logits[:, :-1] / temperature
    targets = labels[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    loss.backward()

    gradients = {name: weight.grad for name, weight in weights.items()}
    return loss.item(), gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_transformers_model(family):
    model = tiny_model(3, **FAMILIES[family]).double()
    tokens, mask = pad_rows(rollouts_of(3))

    with torch.no_grad():
        theirs = oracle(model)(input_ids=tokens, attention_mask=mask).logits
        reference = compute_padded_logits(model.state_dict(), model.config, tokens, mask)

    difference = (reference - theirs)[mask.bool()]
    assert difference.abs().max() < 1e-5


# --- ours -----------------------------------------------------------------------------------------


def make_advantages(rollouts, group_size: int) -> torch.Tensor:
    """Make advantages (R,) that identical siblings share."""
    if group_size == 1:
        return torch.linspace(-1, 1, len(rollouts), dtype=torch.float64)
    # identical siblings have equal rewards, so equal advantages
    rewards = [hash((r.group, r.ids)) % 97 / 97 for r in rollouts]
    rewards = torch.tensor(rewards, dtype=torch.float64)
    config = LossConfig(advantage_eps=0.1)
    return compute_group_advantages(rewards, group_size, normalize_by_std, config)


def list_budgets(rollouts) -> list[tuple[int, str]]:
    """List the tokens per micro-batch, each with the head that it is tried with."""
    lengths = [len(r.prompt.ids) + len(r.ids) for r in rollouts]
    longest = max(lengths) - 1
    everything = sum(lengths)
    return [
        (longest, "recompute"),
        (longest + 11, "fused"),
        (2 * longest, "recompute"),
        (everything, "fused"),
        (everything, "recompute"),
    ]


def sum_losses_backward(model, batches, total: int, head: str, budget: int) -> float:
    """Sum the micro-batches' losses and leave their gradient in the model."""
    loss_config = LossConfig(clip_ratio_low=CLIP, kl_coef=KL)
    objective = resolve_objective(loss_config, ModelConfig(head=head))
    loss_sum = 0.0
    for batch in batches:
        assert len(batch.tokens) <= budget
        loss, *_ = compute_policy_loss(model, batch, total, TEMPERATURE, objective)
        loss.backward()
        loss_sum += loss.item()
    return loss_sum


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group_size", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradient_equals_the_padded_one(family, group_size, tied):
    """Compare either head: they take turns over the micro-batch budgets."""
    shape = FAMILIES[family] | dict(tie_word_embeddings=tied)
    policy = tiny_model(1, **shape).double()
    frozen = tiny_model(2, **shape).double()
    rollouts = rollouts_of(group_size)
    adv = make_advantages(rollouts, group_size)
    total = sum(len(r.ids) for r in rollouts)
    want_loss, want = reference_gradients(policy, frozen, rollouts, adv, total)
    texts, first = deduplicate(rollouts)
    if group_size >= 3:
        assert len(texts) < len(rollouts)

    worst = 0.0
    batch_counts = set()
    for budget, head in list_budgets(rollouts):
        model = copy.deepcopy(policy)
        packed = pack_rollouts(texts, budget)
        batches = add_ref_logp(frozen, packed, TEMPERATURE)
        batches = add_advantages(batches, adv[first])
        batch_counts.add(len(batches))

        loss = sum_losses_backward(model, batches, total, head, budget)

        assert loss == pytest.approx(want_loss, rel=1e-10, abs=1e-12)
        for name, parameter in model.named_parameters():
            difference = parameter.grad - want[name]
            error = (difference.norm() / want[name].norm()).item()
            assert error <= 1e-12, (name, budget, error)
            worst = max(worst, error)
    assert 1 in batch_counts
    assert max(batch_counts) > 2
    print(
        f"{family}, groups of {group_size}, tied {tied}: largest ||a-b||/||b|| {worst:.1e} "
        f"over micro-batch counts {sorted(batch_counts)}"
    )
