"""Every setting, its default and what it means, as frozen dataclasses. config/loader.py reads them
from YAML and checks them.
"""

from dataclasses import dataclass, field


class ConfigError(ValueError):
    """A setting is wrong. The message names the key and says what to do."""


@dataclass(frozen=True)
class RunConfig:
    # everything the run writes: new, or a run of this very config, which then goes on
    dir: str = "runs/run"
    seed: int = 0
    threads: int = 0  # torch's threads per process; 0: the machine's cores, shared by its ranks
    # seconds a rank waits for the others in one collective, once training has begun
    patience: int = 300


@dataclass(frozen=True)
class ModelConfig:
    # HF folder (config.json, safetensors, tokenizer, chat template) or hub id (org/name)
    path: str = ""
    # sdpa | varlen | flash (GPU, bfloat16) | auto: varlen where it can run, else sdpa
    attention: str = "auto"
    # one_shot: gradients made in the forward, losses that are sums over tokens | recompute: any
    # loss
    head: str = "one_shot"
    head_float32: bool = False  # logits by a float32 product where the rest computes in bfloat16
    kernels: str = "torch"  # torch | triton (GPU)
    # CPU, float32: log-probs do not depend on the batch; sampler's and trainer's are equal bit for
    # bit
    batch_invariant: bool = False
    # float32 | bfloat16 | auto (bfloat16 on a GPU); masters and optimizer are float32
    compute: str = "auto"


@dataclass(frozen=True)
class DataConfig:
    corpus: str = ""  # JSONL[.gz] {id, title, text}
    # JSONL[.gz] {id, text, what the task needs}; a fixed hash tenth of it is validation
    train_queries: str = ""
    train_qrels: str = ""  # TSV[.gz] query id, document id, gain
    test_queries: str = ""  # both empty: a second hash tenth of the train queries
    test_qrels: str = ""
    on_bad_line: str = "stop"  # stop | drop (counted)
    on_long_prompt: str = "stop"  # stop | drop (counted)
    shuffle_words: float = 0.0  # share of training prompts whose words stand in random order


@dataclass(frozen=True)
class RetrieverConfig:
    kind: str = "bm25"  # bm25 | dense | rank_bm25 | module:function
    variant: str = "lucene"  # lucene | okapi
    length: str = "exact"  # exact | lucene (its one-byte lengths)
    k1: float = 1.2
    b: float = 0.75
    scorer: str = "torch"  # torch | numba (extra [fast], CPU, the faster one)
    # search "(contents:QUERY)" as the published code does, which loses the query's first word
    upstream_wrapping: bool = False
    index_dir: str = ""  # where the index is kept; empty: beside the run
    encoder: str = ""  # dense: HF folder or hub id
    pooling: str = "cls"  # cls | mean
    max_length: int = 512  # tokens of a text that the encoder reads; longer ones are cut
    # what stands before each query and before each document (E5)
    prefixes: tuple[str, str] = ("", "")
    dtype: str = "float32"  # float32 | float16 | bfloat16: what the encoder computes in
    index: str = "exact"  # exact | hnsw
    ef_search: int = 512  # hnsw: how many candidates a search keeps
    timeout: float = 0.0  # seconds that one search by a module:function may take; 0: no limit


@dataclass(frozen=True)
class PromptConfig:
    system: str = ""  # empty: no system message
    # {query} is where the user's text goes; the task says which places there are
    user: str = "{query}"
    assistant: str = "<think>"  # what the answer begins with, given, not sampled
    max_tokens: int = 256
    title_words: int = 0  # titles of items are cut to so many words; 0: whole


@dataclass(frozen=True)
class RewardConfig:
    k_train: int = 1000  # depth of the ranking that is rewarded
    k_eval: int = 100  # depth of the ranking that is reported
    k_list: int = 10  # depth that diversity and novelty look at
    metric: str = "ndcg"  # what evaluations compare: ndcg | recall | mrr | hit
    # of the parts (tasks/rewards.py), module:function for one of yours
    weights: dict[str, float] = field(default_factory=lambda: {"ndcg": 1.0})
    remove_seen: bool = False  # sequential: what stands in the history is no hit
    bonus: float = 0.1  # added when the accuracy (weighted ndcg, recall, mrr, hit, lcs) is above 0
    miss: float = 0.0  # in place of both when it is 0
    unparsable: float = -2.0  # total when there is no answer to score
    overlong: int = 0  # DAPO: tokens before max_new_tokens over which a penalty grows to 1; 0: none


@dataclass(frozen=True)
class SamplingConfig:
    group_size: int = 8
    temperature: float = 1.0
    # below 1 the gradient is biased: said at start and in summary.json, the mass cut off is logged
    top_p: float = 1.0
    max_new_tokens: int = 512
    # of keys and values at once: more texts wait; 0: a GPU's free memory, on a CPU all
    cache_gib: float = 0.0
    # DAPO: rounds of other prompts in place of groups whose rewards are all equal
    resample: int = 0


@dataclass(frozen=True)
class LossConfig:
    kind: str = "grpo"  # grpo | dr_grpo | dapo | gspo | cispo | rloo | reinforce | module:function
    advantage: str = ""  # mean_std | mean | leave_one_out | module:function; empty: the kind's own
    average: str = ""  # token | sequence | constant; empty: the kind's own
    clip: float = 0.2
    clip_high: float = 0.0  # upper side (DAPO's clip-higher); 0: as clip
    kl: float = 0.0  # weight of the KL to the initial policy; 0: no reference is kept
    kl_estimator: str = "k3"  # k1 | k2 | k3
    kl_in: str = "loss"  # loss | reward
    reference_on_host: bool = False  # the reference's shards lie in host memory
    entropy: float = 0.0  # weight of the entropy bonus
    # cap of exp(trainer - sampler) as a weight (truncated importance sampling); 0: not applied
    importance_cap: float = 0.0
    std_floor: float = 1e-6  # advantage = (r - mean) / (std + std_floor)

    @property
    def high(self) -> float:
        """The clip's upper side."""
        return self.clip_high or self.clip


@dataclass(frozen=True)
class SftConfig:  # python -m recr1.sft alone
    # JSONL[.gz] {id of a train query, text of the completion} | self: the best of
    # sampling.group_size samples
    teacher: str = ""
    # all | no_worse | better: texts whose reward.metric@k_train is at least, or above, that of the
    # raw answer
    keep: str = "all"
    least: float = 0.0  # reward.metric@k_train that a text must reach to be kept
    # false: the prompt's tokens but the first are learnt too, as Rec-R1's SFT did
    mask_prompt: bool = True
    epochs: int = 0  # passes over what is kept; 0: train.steps


@dataclass(frozen=True)
class OptimizerConfig:
    kind: str = "adamw"  # adamw | muon (matrices by Muon, the rest by AdamW)
    lr: float = 1e-6
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0
    final_lr: float = 1.0  # share of lr that the linear decay ends at; 1: constant
    clip_norm: float = 1.0
    on_nonfinite: str = "stop"  # stop | skip (the step; counted)
    max_skips: int = 10  # stop after so many skipped in a row
    on_host: bool = False  # AdamW's moments lie in host memory and come to the GPU shard by shard


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    prompts_per_step: int = 32
    inner_steps: int = 1  # optimiser steps per batch of rollouts, over equal shares of its prompts
    tokens_per_micro_batch: int = 16384
    checkpointing: bool = False  # keep only each block's input and compute it again in the backward
    # when gradients are summed over ranks: micro_batch | step (whole gradients are kept: less
    # traffic)
    reduce: str = "micro_batch"
    # weights that are not trained: patterns of names, e.g. "model.embed_tokens.*, *norm.weight"
    frozen: str = ""
    replay: str = ""  # rollouts.jsonl.gz of a run: train on its logged steps, without a sampler
    eval_every: int = 100  # steps between validations; 0: none
    eval_queries: int = 0  # how many of the validation queries; 0: all


@dataclass(frozen=True)
class SaveConfig:
    every: int = 100  # steps between checkpoints; 0: none but at SIGTERM
    keep: int = 2  # so many of the last, and the best on validation


@dataclass(frozen=True)
class LogConfig:
    tokens_every: int = 10  # steps between rollouts logged with their per-token values
    print_every: int = 1
    show_every: int = 10  # steps between tables of three rollouts on the console; 0: none
    track: str = "none"  # tensorboard | wandb | trackio: where metrics.jsonl's rows go beside


@dataclass(frozen=True)
class Config:
    # product_search | sequential | rerank | recommend_list | module:Class
    task: str = "product_search"
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
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
