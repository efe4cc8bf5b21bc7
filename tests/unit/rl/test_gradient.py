"""The packed gradient equals a padded float64 reference: one padded row per sibling, a mask, plain
autograd; no line of it is ours.
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
    """Five prompts of unequal length; completions of 1 to 9 tokens; every third sibling repeats its
    elder.
    """
    g = torch.Generator().manual_seed(seed)
    vocab = tiny_config().vocab_size

    def ids(low, high):
        return tuple(
            torch.randint(
                vocab, (int(torch.randint(low, high, (1,), generator=g)),), generator=g
            ).tolist()
        )

    rollouts = []
    for p in range(5):
        prompt = Prompt(f"q{p}", p, "", ids(1, 8))
        written = []
        for s in range(group_size):
            text = written[-1] if s % 3 == 2 else (ids(1, 2) if s == 0 and p == 0 else ids(1, 10))
            written.append(text)
            rollouts.append(Rollout(prompt, p, s, text, (0.0,) * len(text), True))
    return rollouts


def norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def padded_logits(w: dict, c, tokens, mask):
    """The three families on a padded rectangle, all in float64 (transformers' own rounds norms and
    rope). tokens, mask (R, W) -> (R, W, V).
    """
    R, W = tokens.shape
    # positions per turn
    wave = (
        2
        * torch.pi
        * c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    )
    if s := c.rope_scaling:  # as Meta wrote it: three cases by wavelength
        short = s.original_max_position_embeddings / s.high_freq_factor
        long = s.original_max_position_embeddings / s.low_freq_factor
        smooth = (s.original_max_position_embeddings / wave - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        between = 1 / ((1 - smooth) / (s.factor * wave) + smooth / wave)
        wave = torch.where(wave < short, wave, torch.where(wave > long, s.factor * wave, between))
    angle = torch.arange(W, dtype=torch.float64)[:, None] * 2 * torch.pi / wave
    # (W, D/2)
    cos = angle.cos()
    sin = angle.sin()
    # (R, 1, W, W)
    allowed = torch.ones(W, W, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]

    def heads(x, name, rotary):
        x = (
            (
                x @ w[f"{name}_proj.weight"].T
                + (w[f"{name}_proj.bias"] if c.family == "qwen2" else 0)
            )
            .view(R, W, -1, c.head_dim)
            .transpose(1, 2)
        )
        if rotary:
            x = norm(x, w[f"{name}_norm.weight"], c.rms_norm_eps) if c.family == "qwen3" else x
            low, high = x.chunk(2, -1)
            x = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
        return x.repeat_interleave(c.num_attention_heads // x.shape[1], 1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        h = norm(x, w[at + "input_layernorm.weight"], c.rms_norm_eps)
        q, k, v = (heads(h, f"{at}self_attn.{n}", n != "v") for n in "qkv")
        p = (q @ k.mT / c.head_dim**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
        x = x + (p @ v).transpose(1, 2).flatten(2) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"], c.rms_norm_eps)
        gate, up = (h @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[at + "mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"]
    return norm(x, w["model.norm.weight"], c.rms_norm_eps) @ head.T


def rectangle(rollouts):
    rows = [[*r.prompt.ids, *r.ids] for r in rollouts]
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor(
        [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    )


def padded_logp(w, c, rollouts):
    """(R, T) log-probs of the completions and which of them are real."""
    tokens, mask = rectangle(rollouts)
    logp = (
        (padded_logits(w, c, tokens, mask) / TEMPERATURE)
        .log_softmax(-1)[:, :-1]
        .gather(-1, tokens[:, 1:, None])[..., 0]
    )
    at = torch.arange(1, tokens.shape[1])  # column t holds the log-prob of token t + 1
    first, end = (
        torch.tensor(x)[:, None]
        for x in ([len(r.prompt.ids) for r in rollouts], mask.sum(1).tolist())
    )
    return logp, (at >= first) & (at < end)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_transformers_model(family):
    model = tiny_model(3, **FAMILIES[family]).double()
    rollouts = rollouts_of(3)
    tokens, mask = rectangle(rollouts)
    with torch.no_grad():
        theirs = oracle(model)(input_ids=tokens, attention_mask=mask).logits
        ours = padded_logits(model.state_dict(), model.config, tokens, mask)
    assert (ours - theirs)[mask.bool()].abs().max() < 1e-5


def reference_gradients(policy, frozen, rollouts, adv, total):
    w = {name: t.detach().clone().requires_grad_() for name, t in policy.state_dict().items()}
    logp, real = padded_logp(w, policy.config, rollouts)
    with torch.no_grad():
        ref, _ = padded_logp(frozen.state_dict(), frozen.config, rollouts)
    ratio = (logp - logp.detach()).exp()
    gain = torch.minimum(ratio * adv[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * adv[:, None])
    d = ref - logp
    loss = ((KL * (d.exp() - d - 1) - gain) * real).sum() / total
    loss.backward()
    return loss.item(), {name: t.grad for name, t in w.items()}


def padded_cross_entropy(model, texts, mask_prompt, temperature=1.0):
    """(loss, {name: gradient}) of SFT by torch's cross_entropy: padded rows, what is not learnt at
    its ignore_index.
    """
    w = {name: t.detach().clone().requires_grad_() for name, t in model.state_dict().items()}
    tokens, mask = rectangle(texts)
    labels = torch.where(mask.bool(), tokens, -100)
    for row, r in zip(labels, texts):
        row[: len(r.prompt.ids) if mask_prompt else 1] = -100
    logits = padded_logits(w, model.config, tokens, mask)[:, :-1] / temperature
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.item(), {name: t.grad for name, t in w.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group_size", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradient_equals_the_padded_one(family, group_size, tied):
    """With either head: they take turns over the micro-batch budgets."""
    policy, frozen = (
        tiny_model(seed, **FAMILIES[family] | dict(tie_word_embeddings=tied)).double()
        for seed in (1, 2)
    )
    rollouts = rollouts_of(group_size)
    if group_size > 1:  # identical siblings have equal rewards, so equal advantages
        rewards = torch.tensor(
            [hash((r.group, r.ids)) % 97 / 97 for r in rollouts], dtype=torch.float64
        )
        adv = compute_group_advantages(
            rewards, group_size, normalize_by_std, LossConfig(advantage_eps=0.1)
        )
    else:
        adv = torch.linspace(-1, 1, len(rollouts), dtype=torch.float64)
    total = sum(len(r.ids) for r in rollouts)
    want_loss, want = reference_gradients(policy, frozen, rollouts, adv, total)
    texts, first = deduplicate(rollouts)
    assert group_size < 3 or len(texts) < len(rollouts)
    longest = max(len(r.prompt.ids) + len(r.ids) - 1 for r in rollouts)
    everything = sum(len(r.prompt.ids) + len(r.ids) for r in rollouts)
    worst = 0.0
    batch_counts = set()
    for i, budget in enumerate((longest, longest + 11, 2 * longest, everything, everything)):
        loss_of = resolve_objective(
            LossConfig(clip_ratio_low=CLIP, kl_coef=KL),
            ModelConfig(head="fused" if i % 2 else "recompute"),
        )
        model = copy.deepcopy(policy)
        batches = add_advantages(
            add_ref_logp(frozen, pack_rollouts(texts, budget), TEMPERATURE), adv[first]
        )
        batch_counts.add(len(batches))
        losses = []
        for batch in batches:
            assert len(batch.tokens) <= budget
            loss, *_ = compute_policy_loss(model, batch, total, TEMPERATURE, loss_of)
            loss.backward()
            losses.append(loss.item())
        assert sum(losses) == pytest.approx(want_loss, rel=1e-10, abs=1e-12)
        for name, p in model.named_parameters():
            error = ((p.grad - want[name]).norm() / want[name].norm()).item()
            worst = max(worst, error)
            assert error <= 1e-12, (name, budget, error)
    assert 1 in batch_counts
    assert max(batch_counts) > 2
    print(
        f"{family}, groups of {group_size}, tied {tied}: largest ||a-b||/||b|| {worst:.1e} "
        f"over micro-batch counts {sorted(batch_counts)}"
    )
