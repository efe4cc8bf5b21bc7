"""The memory that a run needs on each rank, by phase, before it starts: what `recr1 plan` adds up.

A phase needs what its largest moment needs. A moment is a sum of terms, each with the formula by
which the code named beside it allocates. Nothing is fitted to measurements
(experiments/benchmarks/plan.py compares). The worst case is counted: completions are as long as the
config lets them be, all siblings differ, micro-batches are full.

Legend of the formulas: P weights, R of the root (embedding, norm, head), U of a block; P', R', U'
those that are trained; W ranks; e bytes of a number in the compute dtype; L layers, C width, F
inner width, V vocabulary, H query heads, K kv heads, D head dim, r LoRA's rank; M tokens, N targets
of a micro-batch; attention's rows: B of T queries and S slots; in sampling B rows in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil
from typing import NamedTuple

import torch

from recr1.config.schema import Config, LoraConfig
from recr1.distributed.flat_param import ModuleParam, params_by_block
from recr1.kernels.logprob import BLOCK_BYTES, SLICE_BYTES, WORKSPACE_BYTES
from recr1.model.decoder import Decoder
from recr1.model.lora import A_NAME, add_adapters
from recr1.model.packed_attention import ROW_MULTIPLE, SHORT_ROWS, SLOT_MULTIPLE
from recr1.model.rope import DecoderConfig
from recr1.sampling.generate import MAX_PREFILL_TOKENS
from recr1.sampling.kv_cache import count_slots, grow

ROWS_AT_ONCE = 512  # prompts that are decoded together in an evaluation, at most

HEAD_FORMULA = "{}; 0 where the head is frozen"
CACHE_FORMULA = "2 e L K D rows slots  (KVCache.kv)"
# One block's activations.
BLOCK_FORMULA = (
    "2 M C (4 + 2 e) + e M (4 F + H D) + attention's rows; "
    "LoRA: e M r for each adapter, e less for a frozen norm"
)

# The norms of a block, and the linears that read each one's output.
INPUT_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


class MemoryTerm(NamedTuple):
    """Name an allocation, its formula, and its bytes on one rank."""

    name: str
    formula: str
    bytes: float


Moment = list[MemoryTerm]  # what is allocated at the same time


class AttentionRows(NamedTuple):
    """Describe the padded rows of one attention call: B rows of T queries and S slots."""

    rows: float
    queries: int
    slots: int
    masks: float  # how many masks (T, S) there are: one for all rows, or one for each


class MicroBatchSize(NamedTuple):
    """Describe a full micro-batch. Numbers may be fractions of a group: lengths vary."""

    tokens: float  # M
    targets: float  # N
    attention: list[AttentionRows]
    is_only_one: bool  # of its optimizer step


class CacheGrowth(NamedTuple):
    """Hold the bytes of the sampler's cache as it grows."""

    after_prompts: int
    after_fork: int  # once siblings have chosen different first tokens
    at_end: int


class WeightSizes(NamedTuple):
    """Hold the numbers of each weight of the root or of a block, by name; a block's names begin
    behind "model.layers.0.".
    """

    trained: dict[str, int]
    frozen: dict[str, int]

    def count_trained(self, start: str = "") -> int:
        """Return the numbers of the trained weights whose names start so."""
        return sum(size for name, size in self.trained.items() if name.startswith(start))

    def count_frozen(self) -> int:
        return sum(self.frozen.values())

    def count_all(self) -> int:
        return self.count_trained() + self.count_frozen()

    def is_trained(self, linear: str) -> bool:
        """Return whether autograd keeps a linear's input: for its weight's gradient or for its
        adapter's.
        """
        return f"{linear}.weight" in self.trained or f"{linear}.{A_NAME}" in self.trained


class TrainingTerms(NamedTuple):
    """Hold what the moments of a micro-batch's forward and backward have in common."""

    batch: MicroBatchSize
    shared: Moment  # gathered weights, layout
    saved: MemoryTerm  # activations kept for the backward
    block_activations: float  # of one block, without gradient checkpointing
    attention_temporaries: float  # of one block's largest attention call
    held_gradients: float  # of the micro-batches before
    reduction_bytes: float  # per weight; 0: blocks add to what is held already


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimate the memory of a config on `ranks` devices: `phases()` and `peak()`, in bytes
    per rank.
    """

    cfg: Config
    shape: DecoderConfig
    ranks: int
    gpu: bool = True

    # --- sizes of the config ----------------------------------------------------------------------

    @cached_property
    def number_bytes(self) -> int:
        """Return e, the bytes of a number in the compute dtype."""
        kind = self.cfg.model.compute
        is_bfloat16 = kind == "bfloat16" or kind == "auto" and self.gpu
        return 2 if is_bfloat16 else 4

    @cached_property
    def weight_sizes(self) -> list[WeightSizes]:
        """Return the weights of the root, then of each block."""
        return _list_weight_sizes(self.shape, self.cfg.train.frozen, self.cfg.lora)

    @property
    def root(self) -> WeightSizes:
        """Return the weights of embedding, last norm and head."""
        return self.weight_sizes[0]

    @cached_property
    def block(self) -> WeightSizes:
        """Return the weights of the block with the most trained ones."""
        return max(self.weight_sizes[1:], key=WeightSizes.count_trained)

    @cached_property
    def num_weights(self) -> int:
        """Return P."""
        return sum(map(WeightSizes.count_all, self.weight_sizes))

    @cached_property
    def trained_weights(self) -> int:
        """Return P'."""
        return sum(map(WeightSizes.count_trained, self.weight_sizes))

    @cached_property
    def trained_root_weights(self) -> int:
        """Return R'."""
        return self.root.count_trained()

    @cached_property
    def trained_block_weights(self) -> int:
        """Return U'."""
        return self.block.count_trained()

    @property
    def trains_embedding(self) -> bool:
        return "model.embed_tokens.weight" in self.root.trained

    @property
    def trains_head(self) -> bool:
        is_tied = self.shape.tie_word_embeddings
        return self.trains_embedding if is_tied else "lm_head.weight" in self.root.trained

    @property
    def has_adapters(self) -> bool:
        return self.cfg.lora.rank > 0

    @property
    def frozen_bytes(self) -> int:
        """Return the bytes of a number of a frozen shard (training/load_model.py)."""
        return self.number_bytes if self.has_adapters else 4

    @property
    def prompt_len(self) -> int:
        return self.cfg.prompt.max_tokens

    @property
    def group_size(self) -> int:
        return self.cfg.sampling.group_size

    @property
    def completion_inputs(self) -> int:
        """Return the tokens of a completion that are inputs: all but the last."""
        return self.cfg.sampling.max_new_tokens - 1

    @property
    def prompts_per_rank(self) -> int:
        return ceil(self.cfg.train.prompts_per_step / self.ranks)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sequence."""
        return self.prompt_len + self.completion_inputs + 1

    @property
    def group(self) -> int:
        """Return the packed tokens of a group: the prompt once, and each completion's inputs."""
        return self.prompt_len + self.group_size * self.completion_inputs

    @property
    def step_tokens(self) -> int:
        """Return the packed tokens of a rank's share of one optimizer step."""
        return ceil(self.prompts_per_rank / self.cfg.train.num_mini_batches) * self.group

    @property
    def evaluated(self) -> int:
        """Return how many prompts are decoded together in an evaluation."""
        rollouts = self.prompts_per_rank * self.group_size
        return min(ROWS_AT_ONCE, max(64, rollouts))

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of one token's keys and values in all layers."""
        shape = self.shape
        heads = shape.num_key_value_heads
        return 2 * self.number_bytes * shape.num_hidden_layers * heads * shape.head_dim

    @property
    def device_type(self) -> str:
        return "cuda" if self.gpu else "cpu"

    @property
    def moments_on_host(self) -> bool:
        """Return whether AdamW's moments are elsewhere; a CPU is the host itself."""
        return self.gpu and self.cfg.optimizer.cpu_offload

    @property
    def reference_on_host(self) -> bool:
        """Return whether the reference's shards are elsewhere."""
        return self.gpu and self.cfg.loss.reference_cpu_offload

    @property
    def uses_varlen(self) -> bool:
        """Return whether attention takes rows of unequal length (model/varlen_attention.py).

        What `auto` chooses is asked of a GPU that is not here: an Ampere one or newer is assumed.
        """
        asked = self.cfg.model.attention
        head_dim = self.shape.head_dim
        if asked == "auto":
            return self.gpu and self.number_bytes == 2 and head_dim <= 256 and head_dim % 8 == 0
        return asked != "sdpa"

    # --- terms that several moments share ---------------------------------------------------------

    def count_state(self, gradients: float = 0, cache: bool = True) -> Moment:
        """Return what a rank holds from step to step; the padding of its shards is not counted."""
        cfg = self.cfg
        frozen_weights = self.num_weights - self.trained_weights
        masters = 4 * self.trained_weights + self.frozen_bytes * frozen_weights
        has_reference = cfg.loss.kl_coef > 0 and not self.has_adapters
        reference_on_device = has_reference and not self.reference_on_host
        keeps_cache = cache and not self.gpu and not cfg.train.replay
        return [
            MemoryTerm(
                "master weights",
                "4 P/W; LoRA: 4 P'/W, e for the others  (fsdp.ParamGroup.shard)",
                masters / self.ranks,
            ),
            MemoryTerm(
                "Adam's moments",
                "8 P'/W  (optimizer.py); optimizer.cpu_offload: 0",
                8 * self.trained_weights / self.ranks * (not self.moments_on_host),
            ),
            MemoryTerm(
                "reference",
                "e P/W  (load_reference); LoRA, loss.reference_cpu_offload: 0",
                self.number_bytes * self.num_weights / self.ranks * reference_on_device,
            ),
            MemoryTerm(
                "gradients",
                "4 P'/W  (shard.grad), after a micro-batch; "
                "train.gradient_sync=last_micro_batch: 4 P', not sharded",
                gradients,
            ),
            MemoryTerm(
                "cache, kept",
                "2 e L K D rows slots  (train.py: on a CPU it stays for the next step)",
                self.count_cache_growth()[-1] * keeps_cache,
            ),
        ]

    def count_gathered(self, blocks: int) -> Moment:
        """Return the gathered weights of the root and of so many blocks."""
        next_shard = (self.ranks > 1) / self.ranks
        return [
            MemoryTerm(
                "gathered root",
                "e R  (Sharded.root); 0 where the shard itself is used: W = 1, stored as computed",
                self._count_copied(self.root),
            ),
            MemoryTerm(
                "gathered blocks",
                "2 e U, and e U/W where W > 1: the running one, the next and its shard; "
                "all L in sampling",
                self._count_copied(self.block) * (blocks + next_shard),
            ),
        ]

    def _count_copied(self, weights: WeightSizes) -> int:
        """Return the bytes that gathering these weights takes. On one rank a shard that is stored
        in the compute type is the full weight itself.
        """
        e = self.number_bytes
        copied = 0
        if self.ranks > 1 or e != 4:
            copied += weights.count_trained()
        if self.ranks > 1 or e != self.frozen_bytes:
            copied += weights.count_frozen()
        return e * copied

    def count_attention(self, calls: list[AttentionRows], with_grad: bool) -> tuple[float, float]:
        """Count the attention of one layer: the bytes that autograd keeps, and what the largest
        call takes beside them while it runs.

        Args:
            calls: of the prompts, then of the completions, if there are any.
        """
        if self.uses_varlen:
            return self._count_varlen(calls, with_grad)
        return self._count_sdpa(calls, with_grad)

    def _count_varlen(self, calls: list[AttentionRows], with_grad: bool) -> tuple[float, float]:
        """Count attention without padding; a row's few padded slots are counted all the same.

        The library's temporaries: FlashAttention's backward (mha_varlen_bwd in torch's
        flash_api.cpp) sums d q in float32, with 128 rows more for each sequence, and makes d k and
        d v for every query head where heads are grouped. torch 2.11 has no grouped heads: what
        repeating them takes there is not counted.
        """
        e = self.number_bytes
        H = self.shape.num_attention_heads
        K = self.shape.num_key_value_heads
        D = self.shape.head_dim
        made: list[float] = []  # beside q, k, v and out
        saved: list[float] = []
        temporary: list[float] = []
        for number, (B, T, S, _) in enumerate(calls):
            is_of_completions = number > 0
            gathered = 2 * e * B * S * K * D * is_of_completions  # keys and values once per sibling
            logsumexp = 4 * B * T * H
            made.append(gathered + logsumexp)
            saved.append(e * B * T * D * (2 * H + 2 * K) + gathered + logsumexp)

            d_qkv = e * B * D * (T * H + 2 * S * K)
            d_q_sum = 4 * B * (T + 128) * H * (D + 1)
            d_kv_heads = 2 * e * B * S * H * D * (H != K)
            temporary.append(d_qkv + d_q_sum + d_kv_heads)
        if with_grad:
            return sum(saved), max(temporary)
        joined_out = sum(e * B * T * H * D for B, T, _, _ in calls)
        return 0, sum(made) + joined_out

    def _count_sdpa(self, calls: list[AttentionRows], with_grad: bool) -> tuple[float, float]:
        """Count attention over padded rows.

        The library's temporaries: SDPA with a mask is on a CPU its flash kernel (keeps out,
        logsumexp and the mask as numbers; runs d q, k, v and a copy of d out). On a GPU no fused
        kernel but cuDNN's takes a mask with grouped heads (sdp_utils.cpp), so the plain formula is
        counted: q, k, v in float32 with heads repeated, softmax (B, H, T, S) in float32; twice that
        more while it runs.
        """
        e = self.number_bytes
        H = self.shape.num_attention_heads
        K = self.shape.num_key_value_heads
        D = self.shape.head_dim
        saved = []
        temporary = []
        for B, T, S, masks in calls:
            scores = B * H * T * S
            padded = e * B * D * (T * H + 2 * S * K)
            if T * S <= SHORT_ROWS:  # eager_attention: matmul's reshape repeats heads
                saved.append(e * (B * H * D * (T + 2 * S) + scores))
                temporary.append(2 * e * scores)
            elif self.gpu and H != K:
                saved.append(4 * (B * H * D * (T + 2 * S) + scores))
                temporary.append(8 * scores)
            else:
                saved.append(padded + B * H * T * (e * D + 4) + e * masks * T * S)
                temporary.append(padded + e * B * H * T * D if with_grad else 0)
        if with_grad:
            return sum(saved), max(temporary)
        # Without autograd only one call's rows are there at a time.
        return 0, max(k + r for k, r in zip(saved, temporary))

    def count_block_forward(self, tokens: float, calls: list[AttentionRows]) -> MemoryTerm:
        """Count one block's forward without autograd: its MLP or its attention."""
        e = self.number_bytes
        shape = self.shape
        heads = 2 * shape.num_attention_heads + 3 * shape.num_key_value_heads
        _, padded_rows = self.count_attention(calls, with_grad=False)
        attention = e * tokens * (2 * shape.hidden_size + heads * shape.head_dim) + padded_rows
        # of the last of three: what the weight gives, what the adapter adds, and their sum
        has_adapter = f"mlp.up_proj.{A_NAME}" in self.block.trained
        matrices = 3 + has_adapter
        mlp = e * tokens * (2 * shape.hidden_size + matrices * shape.intermediate_size)
        return MemoryTerm(
            "one block's forward",
            "e M (2 C + 3 F), LoRA: 4 F; or attention: e M (2 C + (2 H + 3 K) D) + padded rows",
            max(mlp, attention),
        )

    def iterate_head_moments(self, targets: float, with_grad: bool) -> Iterator[Moment]:
        """Yield the moments of kernels/logprob.py's forward; `with_grad`: those of fused."""
        e = self.number_bytes
        width = self.shape.hidden_size
        vocab = self.shape.vocab_size
        d_weight = 4 * vocab * width * self.trains_head
        workspace = min(WORKSPACE_BYTES[self.device_type], targets * vocab * e)
        moment = [
            self._count_selected_hidden(targets),
            MemoryTerm("logits workspace", "e n V <= logprob.WORKSPACE_BYTES", workspace),
        ]
        if with_grad:
            moment.append(MemoryTerm("head: d hidden", "e N C", e * targets * width))
            moment.append(MemoryTerm("head: d weight", HEAD_FORMULA.format("4 V C"), d_weight))

        scales_logits = e == 2 or self.cfg.sampling.temperature != 1
        copies = 3 + scales_logits
        distribution = MemoryTerm(
            "policy on a block",
            "4 b V <= logprob.BLOCK_BYTES: exp twice, entropy's product; "
            "scaled unless it is the logits",
            copies * min(BLOCK_BYTES[self.device_type], workspace * 4 / e),
        )
        yield moment + [distribution]

        if with_grad and e == 2 and self.trains_head:
            cast = MemoryTerm(
                "head: d weight's cast",
                "e V C; on a CPU a product and its float32 copy more  (_add_product)",
                e * vocab * width + d_weight * (not self.gpu),
            )
            yield moment + [cast]

    def _count_selected_hidden(self, targets: float) -> MemoryTerm:
        return MemoryTerm(
            "selected hidden",
            "e N C  (log_probs._head_inputs)",
            self.number_bytes * targets * self.shape.hidden_size,
        )

    def count_micro_batch(self) -> MicroBatchSize:
        """Count what a full micro-batch holds."""
        budget = self.cfg.train.tokens_per_micro_batch
        inputs = self.completion_inputs
        if self.group <= budget:
            prompts_per_update = ceil(self.prompts_per_rank / self.cfg.train.num_mini_batches)
            groups = min(prompts_per_update, budget / self.group)
            full_groups = groups
        else:  # a part of one group, with its prompt
            groups = 1
            full_groups = (budget - self.prompt_len) / inputs / self.group_size
        completions = full_groups * self.group_size

        calls = [self._pad_prompts(groups)]
        if inputs > 0:
            calls.append(
                AttentionRows(
                    completions,
                    round_up(inputs, ROW_MULTIPLE),
                    round_up(self.prompt_len + inputs, SLOT_MULTIPLE),
                    masks=completions,
                )
            )
        return MicroBatchSize(
            tokens=groups * self.prompt_len + completions * inputs,
            targets=completions * (inputs + 1),
            attention=calls,
            is_only_one=self.step_tokens <= budget,
        )

    def _pad_prompts(self, prompts: float) -> AttentionRows:
        queries = round_up(self.prompt_len, ROW_MULTIPLE)
        slots = round_up(self.prompt_len, SLOT_MULTIPLE)
        return AttentionRows(prompts, queries, slots, masks=1)

    # --- moments of training ----------------------------------------------------------------------

    def iterate_training_moments(self) -> Iterator[Moment]:
        """Yield the moments of a micro-batch's forward and backward, in order."""
        terms = self._count_training_terms()
        yield from self._iterate_loss_moments(terms)
        yield from self._iterate_block_moments(terms)
        yield self._count_root_moment(terms)

    def _count_training_terms(self) -> TrainingTerms:
        batch = self.count_micro_batch()
        e = self.number_bytes
        tokens = batch.tokens
        shape = self.shape
        width = shape.hidden_size
        layers = shape.num_hidden_layers

        attention_saved, attention_temporary = self.count_attention(batch.attention, with_grad=True)
        block_activations = tokens * self._count_kept_per_token() + attention_saved
        if self.cfg.train.gradient_checkpointing:
            formula = "L e M C  (blocks' inputs)"
            saved_bytes = layers * (e * tokens * width)
        else:
            formula = f"L x ({BLOCK_FORMULA})"
            saved_bytes = layers * block_activations

        # Gradients: the full ones where a step reduces them once, else shards.
        reduces_once = self.cfg.train.gradient_sync == "last_micro_batch"
        is_first = batch.is_only_one
        sharding = 1 if reduces_once else 1 / self.ranks
        # One rank adds to the shard's gradient, whose memory the first micro-batch has made.
        adds_in_place = (reduces_once or self.ranks == 1) and not is_first
        reduced = 4 + 4 / self.ranks * (self.ranks > 1)

        layout = sum(map(self._count_layout, batch.attention))
        shared = self.count_gathered(2) + [
            MemoryTerm("rope", "2 e M D", 2 * e * tokens * shape.head_dim),
            MemoryTerm(
                "layout",
                "8 B (T + S) ids, B T S masks; varlen: 16 B S ids  (PackedAttention)",
                layout,
            ),
        ]
        return TrainingTerms(
            batch=batch,
            shared=shared,
            saved=MemoryTerm("activations kept", formula, saved_bytes),
            block_activations=block_activations,
            attention_temporaries=attention_temporary,
            held_gradients=4 * self.trained_weights * sharding * (not is_first),
            reduction_bytes=0 if adds_in_place else reduced,
        )

    def _count_kept_per_token(self) -> float:
        """Return the bytes that autograd keeps of a block for each token, beside its attention's.

        A norm keeps its float32 input, and what its weight's gradient needs; a linear keeps its
        input where it or its adapter is trained, and an adapter x A^T.
        """
        e = self.number_bytes
        shape = self.shape
        width = shape.hidden_size
        heads = shape.num_attention_heads
        block = self.block

        kept = sum(width * self._count_kept_by_norm(norm) for norm in INPUT_READERS)
        if shape.family == "qwen3":
            for name, number in (("q", heads), ("k", shape.num_key_value_heads)):
                weight_is_trained = f"self_attn.{name}_norm.weight" in block.trained
                kept += number * shape.head_dim * (4 + e * weight_is_trained)

        kept += e * heads * shape.head_dim * block.is_trained("self_attn.o_proj")
        kept += self._count_kept_by_mlp()
        num_adapters = sum(name.endswith(A_NAME) for name in block.trained)
        return kept + e * self.cfg.lora.rank * num_adapters

    def _count_kept_by_norm(self, norm: str) -> int:
        """Return the bytes that autograd keeps of a norm for each number of its width."""
        weight_is_trained = f"{norm}.weight" in self.block.trained
        output_is_read = any(map(self.block.is_trained, INPUT_READERS[norm]))
        return 4 + self.number_bytes * (weight_is_trained + output_is_read)

    def _count_kept_by_mlp(self) -> int:
        """Return the bytes that autograd keeps of an MLP for each token: of its gate, what is made
        of it, `up`, and the input of `down`.
        """
        inner = 3 + self.block.is_trained("mlp.down_proj")
        return self.number_bytes * self.shape.intermediate_size * inner

    def _count_layout(self, call: AttentionRows) -> float:
        """Return the bytes of the indices that one attention call of a micro-batch needs."""
        B, T, S, masks = call
        if self.uses_varlen:
            return 16 * B * S
        return 8 * B * (T + S) + masks * T * S

    def _iterate_loss_moments(self, terms: TrainingTerms) -> Iterator[Moment]:
        """Yield the moments of the head: its forward, and its gradients' way into the backward."""
        e = self.number_bytes
        targets = terms.batch.targets
        width = self.shape.hidden_size
        norm_is_trained = "model.norm.weight" in self.root.trained
        last_norm = MemoryTerm(
            "last norm",
            "M C (4 + e), frozen: 4 M C",
            terms.batch.tokens * width * (4 + e * norm_is_trained),
        )
        base = self.count_state(terms.held_gradients) + terms.shared + [terms.saved, last_norm]

        for moment in self.iterate_head_moments(targets, with_grad=self.cfg.model.head == "fused"):
            yield base + moment
        if self.cfg.model.head == "recompute":
            yield base + self._count_recomputed_head(targets)

        d_weight = self._count_head_gradient()
        yield base + [
            MemoryTerm("head: d hidden", "e N C", e * targets * width),
            d_weight,
            MemoryTerm(
                "head: d weight once more",
                "e V C, as the gradient of head[:reachable]",
                d_weight.bytes,
            ),
        ]

    def _count_recomputed_head(self, targets: float) -> Moment:
        """Return the terms of the backward that computes the logits a second time."""
        e = self.number_bytes
        width = self.shape.hidden_size
        vocab = self.shape.vocab_size
        is_half = e == 2
        logits = min(SLICE_BYTES[self.device_type], targets * vocab * e)
        copies = 3 if is_half else 1
        return [
            self._count_selected_hidden(targets),
            MemoryTerm(
                "logits workspace",
                "e N v <= logprob.SLICE_BYTES, and 4 N v when e = 2",
                logits * copies,
            ),
            MemoryTerm(
                "head: d hidden",
                "4 N C, and e N C when it is cast",
                (4 + e * is_half) * targets * width,
            ),
            MemoryTerm(
                "head: d weight", HEAD_FORMULA.format("e V C"), e * vocab * width * self.trains_head
            ),
        ]

    def _count_head_gradient(self) -> MemoryTerm:
        formula = HEAD_FORMULA.format("e V C, until the root's reduction")
        return MemoryTerm("head: d weight", formula, self._count_matrix() * self.trains_head)

    def _count_matrix(self) -> int:
        """Return the bytes of a gradient of the head or of the embedding."""
        return self.number_bytes * self.shape.vocab_size * self.shape.hidden_size

    def _count_gradient_in_flight(self, terms: TrainingTerms) -> MemoryTerm:
        return MemoryTerm(
            "gradient under way",
            "4 U' (1 + 1/W)  (Sharded._reduce: while the block before runs)",
            terms.reduction_bytes * self.trained_block_weights,
        )

    def _iterate_block_moments(self, terms: TrainingTerms) -> Iterator[Moment]:
        """Yield the moments of three blocks' backward: the last, the one before it, the first."""
        e = self.number_bytes
        layers = self.shape.num_hidden_layers
        recomputed = MemoryTerm(
            "block computed again",
            BLOCK_FORMULA,
            terms.block_activations if self.cfg.train.gradient_checkpointing else 0,
        )
        backward = MemoryTerm(
            "block's backward",
            "e (M (C + 2 F) + C F), LoRA: e M (2 C + 2 F), or attention's where that is more",
            self._count_block_backward(terms),
        )
        gradient = MemoryTerm(
            "block's gradient",
            "e U' as computed, 4 U' as reduced",
            (e + terms.reduction_bytes) * self.trained_block_weights,
        )
        in_flight = self._count_gradient_in_flight(terms)

        # Of the blocks whose backward is over, the last one's gradient is under way.
        for blocks_done in (0, 1, layers - 1):
            gradients = terms.held_gradients
            if terms.batch.is_only_one:
                reduced_blocks = max(0, blocks_done - 1)
                gradients = 4 * self.trained_block_weights / self.ranks * reduced_blocks
            saved_bytes = terms.saved.bytes * (1 - blocks_done / layers)
            flight_bytes = in_flight.bytes * (blocks_done > 0)
            common = (
                self.count_state(gradients)
                + terms.shared
                + [
                    terms.saved._replace(bytes=saved_bytes),
                    self._count_head_gradient(),
                    in_flight._replace(bytes=flight_bytes),
                ]
            )
            yield common + [recomputed, backward]
            yield common + [gradient]

    def _count_block_backward(self, terms: TrainingTerms) -> float:
        """Return the bytes that a block's backward takes beside the activations: in its MLP or in
        its attention, when the MLP's activations are freed.
        """
        e = self.number_bytes
        M = terms.batch.tokens
        C = self.shape.hidden_size
        F = self.shape.intermediate_size
        has_adapter = f"mlp.down_proj.{A_NAME}" in self.block.trained
        scaled_gradient = M * C * has_adapter  # what an adapter's B gets: s times the gradient
        mlp = e * (M * (C + 2 * F) + scaled_gradient + self.block.count_trained("mlp.down_proj"))

        freed_mlp = M * self._count_kept_by_mlp()
        freed_norm = M * C * self._count_kept_by_norm("post_attention_layernorm")
        held_gradients = self.block.count_trained("mlp.") + self.block.count_trained(
            "self_attn.o_proj"
        )
        gradients = e * (2 * M * C + held_gradients)
        attention = terms.attention_temporaries - freed_mlp - freed_norm + gradients
        return max(mlp, attention)

    def _count_root_moment(self, terms: TrainingTerms) -> Moment:
        """Return the last moment of the backward: the gradient of embedding, norm and head."""
        d_matrix = self._count_matrix()
        computed = d_matrix * (self.trains_embedding + self.trains_head)
        summed = computed / 2 if self.shape.tie_word_embeddings else computed
        as_reduced = summed + terms.reduction_bytes * self.trained_root_weights
        gradients = terms.held_gradients
        if terms.batch.is_only_one:
            gradients = 4 * (self.trained_weights - self.trained_root_weights) / self.ranks
        return (
            self.count_state(gradients)
            + self.count_gathered(0)
            + [
                self._count_gradient_in_flight(terms),
                MemoryTerm(
                    "root's gradient",
                    "e V C of the embedding and of the head, one where tied, and 4 R' as reduced",
                    max(computed, as_reduced),
                ),
            ]
        )

    # --- moments of sampling ----------------------------------------------------------------------

    def count_cache_growth(self, prompts: int = 0, group_size: int = 0) -> CacheGrowth:
        """Return the bytes of the sampler's cache as it grows (KVCache._reserve). On a GPU it has
        its full size at once, so that CUDA graphs find it where it was.

        0 prompts, group_size: those of the config.
        """
        prompts, rows = self._count_running(prompts, group_size)
        max_slots = count_slots(self.longest)
        if self.gpu:
            size = self.slot_bytes * rows * max_slots
            return CacheGrowth(size, size, size)

        allocated_rows = 0
        allocated_slots = 0
        sizes = []
        for needed_rows, needed_tokens in (
            (prompts, self.prompt_len),
            (rows, self.prompt_len + 1),
            (rows, self.prompt_len + self.completion_inputs),
        ):
            needed_slots = count_slots(needed_tokens)
            allocated_rows = grow(allocated_rows, needed_rows, rows)
            allocated_slots = grow(allocated_slots, needed_slots, max_slots)
            sizes.append(self.slot_bytes * allocated_rows * allocated_slots)
        return CacheGrowth(*sizes)

    def _count_running(self, prompts: int, group_size: int) -> tuple[int, int]:
        """Return how many prompts enter a generate() together, and how many sequences run at once,
        which sampling.kv_cache_gib limits. 0 prompts, group_size: those of the config.
        """
        prompts = prompts or self.prompts_per_rank
        group_size = group_size or self.group_size
        rows = prompts * group_size
        budget = self.cfg.sampling.kv_cache_gib * 2**30
        max_rows = int(budget / self.slot_bytes) // count_slots(self.longest)
        if max_rows and max_rows < rows:
            return ceil(max_rows / group_size), max_rows
        return prompts, rows

    def iterate_sampling_moments(self, prompts: int = 0, group_size: int = 0) -> Iterator[Moment]:
        """Yield the moments of a generate(): prefill, fork of the siblings, growth, decode step."""
        e = self.number_bytes
        base = self.count_state(cache=prompts > 0) + self.count_gathered(
            self.shape.num_hidden_layers
        )
        if not self.gpu and e == 4:
            base.append(self._count_packed_weights())
        growth = self.count_cache_growth(prompts, group_size)
        prompts, rows = self._count_running(prompts, group_size)
        distribution = MemoryTerm(
            "distribution",
            "8 B V of the token before  (generate)",
            8 * rows * self.shape.vocab_size,
        )

        prefilled = min(prompts, max(1, MAX_PREFILL_TOKENS // self.prompt_len))
        yield base + [
            _make_cache_term(growth.after_prompts),
            self.count_block_forward(prefilled * self.prompt_len, [self._pad_prompts(prefilled)]),
        ]
        copied = MemoryTerm(
            "rows copied",
            "2 e L K D (B - P) p  (KVCache.reorder)",
            self.slot_bytes * (rows - prompts) * self.prompt_len,
        )
        yield base + [_make_cache_term(growth.after_fork), distribution, copied]
        for old, new in (
            (growth.after_prompts, growth.after_fork),
            (growth.after_fork, growth.at_end),
        ):
            if old != new:
                outgrown = MemoryTerm(
                    "cache before it grew", "copied from, then freed  (KVCache._reserve)", old
                )
                yield base + [_make_cache_term(new), distribution, outgrown]

        is_sampling = group_size != 1  # an evaluation is greedy
        scales_logits = e == 2 or is_sampling and self.cfg.sampling.temperature != 1
        policy = MemoryTerm(
            "policy",
            "(8 + e) B V: logits, scaled, exp  (log_probs.make_distribution)",
            (8 + e * scales_logits) * rows * self.shape.vocab_size,
        )
        yield base + [_make_cache_term(growth.at_end), distribution, policy]

    def _count_packed_weights(self) -> MemoryTerm:
        shape = self.shape
        blocks = shape.num_hidden_layers * self.block.count_all()
        head = shape.vocab_size * shape.hidden_size
        return MemoryTerm(
            "weights in oneDNN's order",
            "e (L U + V C)  (packed_for_sampling)",
            self.number_bytes * (blocks + head),
        )

    # --- phases -----------------------------------------------------------------------------------

    def phases(self) -> dict[str, Moment]:
        """Return {phase: the terms of its largest moment}."""
        moments = {
            "loading": [self._count_loading_moment()],
            "sampling": self.iterate_sampling_moments(),
            "evaluation": self.iterate_sampling_moments(self.evaluated, 1),
            "scoring": self._iterate_scoring_moments(),
            "training": self.iterate_training_moments(),
            "update": [self._count_update_moment()],
        }
        return {phase: max(candidates, key=sum_bytes) for phase, candidates in moments.items()}

    def peak(self) -> float:
        """Return the bytes of the largest phase."""
        return max(map(sum_bytes, self.phases().values()))

    def _count_loading_moment(self) -> Moment:
        read = 4 * self.shape.vocab_size * self.shape.hidden_size
        state = self.count_state(cache=False)
        loaded = [term for term in state if term.name in ("master weights", "reference")]
        return loaded + [MemoryTerm("a weight read", "4 V C", read)]

    def _iterate_scoring_moments(self) -> Iterator[Moment]:
        """Yield the moments of the log-probs without gradients: the reference's, old ones."""
        batch = self.count_micro_batch()
        base = self.count_state() + self.count_gathered(2)
        yield base + [self.count_block_forward(batch.tokens, batch.attention)]
        for moment in self.iterate_head_moments(batch.targets, with_grad=False):
            yield base + moment

    def _count_update_moment(self) -> Moment:
        largest_group = max(self.trained_root_weights, self.trained_block_weights)
        largest_shard = largest_group / self.ranks
        return self.count_state(4 * self.trained_weights / self.ranks) + [
            MemoryTerm(
                "moments on their way",
                "2 x 8 n of the largest shard  (offloaded_adamw.py)",
                16 * largest_shard * self.moments_on_host,
            ),
            MemoryTerm(
                "gradient norm",
                "8 n of the largest shard, on a CPU  (_foreach_norm in float64)",
                8 * largest_shard * (not self.gpu),
            ),
        ]


def _make_cache_term(size: float) -> MemoryTerm:
    return MemoryTerm("cache", CACHE_FORMULA, size)


@lru_cache
def _list_weight_sizes(shape: DecoderConfig, frozen: str, lora: LoraConfig) -> list[WeightSizes]:
    """List the weights of the root, then of each block, as training/load_model.py splits them.
    Raises ConfigError for adapters that the model cannot have.
    """
    patterns = tuple(filter(None, map(str.strip, frozen.split(","))))
    with torch.device("meta"):
        decoder = Decoder(shape)
        if lora.rank:
            patterns = tuple(decoder.state_dict())
            add_adapters(decoder, lora)
        units = params_by_block(decoder, patterns)
    return [WeightSizes(_get_sizes(unit.trained), _get_sizes(unit.frozen)) for unit in units]


def _get_sizes(params: list[ModuleParam]) -> dict[str, int]:
    """Return the numbers of each weight by its name in its block."""
    sizes = {}
    for name, module, attribute in params:
        if name.startswith("model.layers."):
            name = name.split(".", 3)[3]
        sizes[name] = getattr(module, attribute).numel()
    return sizes


def sum_bytes(terms: Moment) -> float:
    """Return the bytes of a moment."""
    return sum(term.bytes for term in terms)


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below n."""
    return -(-n // multiple) * multiple
