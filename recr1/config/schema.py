"""Every setting, its default and what it means, as frozen dataclasses.

config/loader.py reads them from YAML and checks them. The comment of a setting is behind it, or on
the lines above it.
"""

from dataclasses import dataclass, field


class ConfigError(ValueError):
    """A setting is wrong. The message names the key and says what to do."""


@dataclass(frozen=True)
class RunConfig:
    # The folder of everything that the run writes. It is new, or that of a run of this very config,
    # which is then resumed.
    dir: str = "runs/run"
    seed: int = 0  # What all random numbers depend on.
    # torch's threads in each process. 0: the machine's cores, divided by its ranks.
    threads: int = 0
    # Sums are made in one order wherever torch has an algorithm that does so; where it has none it
    # warns. A CPU makes them in one order anyway. What it costs on a GPU was not measured.
    deterministic: bool = False
    # Seconds that a rank waits for the others in one collective, once training has begun.
    collective_timeout: int = 300


@dataclass(frozen=True)
class ModelConfig:
    # A Hugging Face folder (config.json, safetensors, tokenizer, chat template) or hub id
    # (org/name).
    path: str = ""
    # sdpa | varlen | flash (GPU, bfloat16) | auto: varlen where it can run, else sdpa.
    attention: str = "auto"
    # fused: the head's gradients are computed in the forward, for losses that are sums over
    # tokens | recompute: the backward computes the logits a second time, for any loss.
    head: str = "fused"
    # Compute the logits by a float32 product where the rest computes in bfloat16.
    head_float32: bool = False
    # What computes head, loss, norms, rope and SwiGLU, and chooses tokens: torch | triton (GPU) |
    # auto: triton on a GPU that can run it, else torch. No GPU has run the Triton kernels yet.
    kernels: str = "torch"
    # On a CPU in float32: log-probs do not depend on the batch, and those of the sampler and the
    # trainer are equal bit for bit.
    batch_invariant: bool = False
    # What the model computes in: float32 | bfloat16 | auto: bfloat16 on a GPU, else float32. The
    # master weights and the optimizer are float32.
    compute: str = "auto"
    # An adapter's folder, ours or PEFT's, that LoRA goes on from. Empty: from a new one.
    adapter: str = ""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA's settings (model/lora.py): small matrices are trained beside the model's weights."""

    rank: int = 0  # Rows of A, columns of B. 0: there is no LoRA, the weights are trained.
    alpha: float = 32.0  # What the adapters add is scaled by alpha / rank.
    # The weights of a block that get an adapter: patterns of modules' names, or of their ends.
    targets: str = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    rslora: bool = False  # Scale by alpha / sqrt(rank).


@dataclass(frozen=True)
class DataConfig:
    corpus: str = ""  # JSONL[.gz] with id, title, text.
    # JSONL[.gz] with id, text and what the task needs. A fixed tenth of it, chosen by a hash, is
    # for validation.
    train_queries: str = ""
    train_qrels: str = ""  # TSV[.gz] with query id, document id, gain.
    # The test split. Both empty: a second tenth of the train queries, chosen by the same hash.
    test_queries: str = ""
    test_qrels: str = ""
    # What a line that cannot be used does: stop | drop (they are counted).
    on_bad_line: str = "stop"
    # What a prompt longer than prompt.max_tokens does: stop | drop (they are counted).
    on_long_prompt: str = "stop"
    # The share of training prompts whose words are put in random order.
    shuffle_words: float = 0.0


@dataclass(frozen=True)
class RetrieverConfig:
    kind: str = "bm25"  # bm25 | dense | rank_bm25 | module:function of yours.
    variant: str = "lucene"  # BM25's formula: lucene | okapi.
    # BM25's document lengths: exact | lucene: rounded to the one byte that Lucene stores.
    length: str = "exact"
    k1: float = 1.2  # BM25: the larger, the more the repetitions of a term count.
    b: float = 0.75  # BM25: how much a document's length counts, from 0 to 1.
    # BM25: what a term that stands n times in the query counts: count: n times | once.
    repeat_terms: str = "count"
    scorer: str = "torch"  # What computes BM25: torch | numba (extra [fast], CPU, the faster one).
    # Search for "(contents:QUERY)" as the published code does, which loses the query's first word.
    reproduce_upstream_query_bug: bool = False
    index_dir: str = ""  # The folder that keeps the index. Empty: beside the run.
    encoder: str = ""  # The dense retriever's Hugging Face folder or hub id.
    pooling: str = "cls"  # A text's vector from its tokens': cls | mean.
    max_length: int = 512  # Tokens of a text that the encoder reads. Longer texts are cut.
    # What is put before each query and before each document (E5 has such prefixes).
    prefixes: tuple[str, str] = ("", "")
    dtype: str = "float32"  # What the encoder computes in: float32 | float16 | bfloat16.
    index: str = "exact"  # The dense index: exact | hnsw.
    ef_search: int = 512  # hnsw: how many candidates a search keeps.
    # Seconds that one call of a module:function's search may take. 0: there is no limit. An
    # evaluation asks for a rank's whole split in one call. Keep it below run.collective_timeout.
    timeout: float = 0.0


@dataclass(frozen=True)
class PromptConfig:
    system: str = ""  # The system message. Empty: there is none.
    # The user's message. The text of the data replaces {query}; the task says which placeholders
    # there are.
    user: str = "{query}"
    assistant: str = "<think>"  # What every answer begins with: it is given, not sampled.
    max_tokens: int = 256  # No prompt may have more tokens (data.on_long_prompt).
    title_words: int = 0  # Titles of items are cut to so many words. 0: they are not cut.


@dataclass(frozen=True)
class RewardConfig:
    k_train: int = 1000  # The depth of the ranking that is rewarded.
    k_eval: int = 100  # The depth of the ranking that is reported.
    k_list: int = 10  # The depth that diversity and novelty look at.
    metric: str = "ndcg"  # What evaluations compare: ndcg | recall | mrr | hit.
    # The weights of the reward's terms (tasks/rewards.py); module:function names one of yours.
    weights: dict[str, float] = field(default_factory=lambda: {"ndcg": 1.0})
    remove_seen: bool = False  # sequential: items of the history are no hits.
    bonus: float = 0.1  # Added for an answer that has earned it: bonus_if.
    # What earns the bonus: accurate, the accuracy (weighted ndcg, recall, mrr, hit, lcs) is above
    # 0 | better, the ndcg is above that of the answer without a policy.
    bonus_if: str = "accurate"
    # The reward in place of accuracy and bonus when the accuracy is 0.
    miss: float = 0.0
    unparsable: float = -2.0  # The total when there is no answer to score.
    # DAPO: over so many tokens before max_new_tokens a penalty grows to 1. 0: there is none.
    overlong_buffer: int = 0


@dataclass(frozen=True)
class SamplingConfig:
    group_size: int = 8  # Completions of each prompt.
    temperature: float = 1.0  # Logits are divided by it, in sampling and in training.
    # Below 1 the gradient is biased. The run says so at its start and in summary.json, and logs the
    # probability that was cut off.
    top_p: float = 1.0
    max_new_tokens: int = 512  # A completion that is so long ends unfinished.
    # GiB of keys and values at once; sequences that do not fit wait. 0: four fifths of what a GPU
    # has free, no limit on a CPU.
    kv_cache_gib: float = 0.0
    # DAPO's dynamic sampling: how many times other prompts are drawn in place of the groups whose
    # rewards are all equal.
    dynamic_sampling: int = 0


@dataclass(frozen=True)
class LossConfig:
    # grpo | dr_grpo | dapo | gspo | cispo | rloo | reinforce | sapo | gmpo | luspo | dppo_tv |
    # dppo_kl | maxrl | pass_at_k | gdpo | module:function of yours.
    kind: str = "grpo"
    # How rewards become advantages: mean_std | mean | leave_one_out | maxrl | pass_at_k | gdpo |
    # module:function of yours. Empty: that of the kind.
    advantage: str = ""
    # How token losses become one (verl's names): token-mean | seq-mean-token-mean |
    # seq-mean-token-sum | seq-mean-token-sum-norm. Empty: that of the kind.
    agg_mode: str = ""
    # The ratio of probabilities is clipped to 1 - clip_ratio_low and 1 + clip_ratio_high. gmpo
    # clips its logarithm by them; dppo_tv and dppo_kl stop a token whose divergence exceeds them.
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.0  # The upper side (DAPO's clip-higher). 0: as clip_ratio_low.
    # The weight of the KL to the initial policy. 0: no reference is kept.
    kl_coef: float = 0.0
    kl_estimator: str = "k3"  # k1 | k2 | k3 | k3_unbiased (rl/kl.py).
    kl_in: str = "loss"  # Where the KL is a term: loss | reward.
    reference_cpu_offload: bool = False  # Keep the reference's shards in host memory.
    entropy_coef: float = 0.0  # The weight of the entropy bonus.
    # Truncated importance sampling: the weight exp(trainer - sampler) of a token is at most this.
    # 0: tokens have no such weight.
    tis_cap: float = 0.0
    tis_floor: float = 0.0  # The weight's lower bound.
    # Whose probabilities the weight compares: token | sequence, the product over a rollout.
    tis_level: str = "token"
    # What happens to a weight beyond tis_floor and tis_cap: truncate, it becomes the bound | mask,
    # it becomes 0 (IcePop).
    tis_mode: str = "truncate"
    # DeepSeek-V3.2: a rollout of negative advantage adds nothing where the mean of its tokens'
    # log-probs, sampler - trainer, is above this. 0: all rollouts add.
    off_policy_mask_threshold: float = 0.0
    # sapo: how fast a token fades out with its ratio; where the advantage is above 0, elsewhere.
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    pass_k: int = 0  # pass_at_k: the best of so many siblings counts. 0: of the whole group.
    advantage_eps: float = 1e-6  # advantage = (r - mean) / (std + advantage_eps)

    @property
    def upper_clip_ratio(self) -> float:
        """Return the upper side of the clip: clip_ratio_high, or clip_ratio_low where that is 0."""
        return self.clip_ratio_high or self.clip_ratio_low

    @property
    def masks_tokens(self) -> bool:
        """Return whether a token may be left out for what sampler and trainer are apart."""
        has_mask = self.tis_cap > 0 and self.tis_mode == "mask"
        return has_mask or self.off_policy_mask_threshold > 0


@dataclass(frozen=True)
class SftConfig:
    """The settings that only `python -m recr1.sft` reads."""

    # JSONL[.gz] with the id of a train query and the text of a completion | self: the best of
    # sampling.group_size samples of the policy.
    teacher: str = ""
    # Which texts are learned: all | no_worse | better: those whose reward.metric@k_train is at
    # least, or above, that of the raw answer.
    filter: str = "all"
    # The reward.metric@k_train that a text must reach to be learned.
    min_score: float = 0.0
    # False: all tokens of the prompt but the first are learned too, as in Rec-R1's SFT.
    mask_prompt: bool = True
    epochs: int = 0  # Passes over the texts that are learned. 0: train.steps counts.


@dataclass(frozen=True)
class OptimizerConfig:
    # adamw | muon: matrices by Muon, the rest by AdamW. Both loops shard the policy and refuse it;
    # experiments/make/make_policy.py, which makes a policy from nothing, uses it.
    kind: str = "adamw"
    lr: float = 1e-6  # AdamW's learning rate.
    muon_lr: float = 0.02  # Muon's learning rate.
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay of its two moments.
    eps: float = 1e-8  # AdamW's addend to the denominator.
    weight_decay: float = 0.01
    warmup_steps: int = 0  # The learning rate grows linearly over so many steps.
    min_lr_ratio: float = 1.0  # The share of lr at which the linear decay ends. 1: lr is constant.
    max_grad_norm: float = 1.0  # A gradient of a larger norm is scaled to this one.
    # What a gradient that is not finite does: stop | skip: leave that step out (they are counted).
    on_nonfinite: str = "stop"
    max_skips: int = 10  # Stop after so many skipped steps in a row.
    # Keep AdamW's moments in host memory; they come to the GPU shard by shard.
    cpu_offload: bool = False


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    prompts_per_step: int = 32  # On all ranks together.
    # Optimizer steps for one step's rollouts, each over an equal share of its prompts.
    num_mini_batches: int = 1
    # Packed tokens in one forward and backward, at most. It changes memory, not the gradient.
    tokens_per_micro_batch: int = 16384
    # Keep only each block's input, and compute the block a second time in the backward.
    gradient_checkpointing: bool = False
    # When gradients are summed over ranks: every_micro_batch | last_micro_batch: until then every
    # rank keeps full gradients, which is less traffic.
    gradient_sync: str = "every_micro_batch"
    # Weights that are not trained: patterns of names, e.g. "model.embed_tokens.*, *norm.weight".
    frozen: str = ""
    # The rollouts.jsonl.gz of a run: train on its logged steps, without sampling.
    replay: str = ""
    eval_every: int = 100  # Steps between validations. 0: there are none.
    eval_queries: int = 0  # How many of the validation queries are used. 0: all.


@dataclass(frozen=True)
class SaveConfig:
    every: int = 100  # Steps between checkpoints. 0: only one at SIGTERM.
    # How many of the last ones are kept, beside the best on validation of those that were saved at
    # a validated step.
    keep_last: int = 2


@dataclass(frozen=True)
class LogConfig:
    tokens_every: int = 10  # Steps between rollouts that are logged with their per-token values.
    print_every: int = 1  # Steps between lines on the console.
    # Steps between tables of three rollouts on the console. 0: there are none.
    show_every: int = 10
    # Where the rows of metrics.jsonl are sent as well: none | tensorboard | wandb | trackio.
    track: str = "none"


@dataclass(frozen=True)
class Config:
    # product_search | sequential | rerank | recommend_list | module:Class of yours.
    task: str = "product_search"
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)
