"""The memory that a run needs on each rank, by phase, before it starts: what `recr1 plan` adds up.

A phase needs what its largest moment needs; a moment is a sum of terms, each with the formula by
which the code named beside it allocates. Nothing is fitted to measurements
(experiments/bench/plan.py compares). Texts are taken to be as long as the config lets them be, all
siblings to differ, micro-batches to be full: the worst that can happen.

Legend: P weights, R of the root (embedding, norm, head), U of a block; P', R', U' those that are
trained; W ranks; e bytes of a number in compute; L layers, C width, F inner width, V vocabulary, H
query heads, K kv heads, D head dim; M tokens, N targets of a micro-batch; attention's rows: B of T
queries and S slots; in sampling B rows in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Iterator, NamedTuple

import torch

from recr1.config.schema import Config
from recr1.distributed.flat_param import params_by_block
from recr1.kernels.logprob import BLOCK_BYTES, SLICE_BYTES, WORKSPACE_BYTES
from recr1.model.decoder import Decoder
from recr1.model.packed_attention import ROW_MULTIPLE, SHORT_ROWS, SLOT_MULTIPLE
from recr1.model.rope import DecoderConfig
from recr1.sampling.kv_cache import count_slots

ROWS_AT_ONCE = 512  # prompts that are decoded together in an evaluation, at most


class MemoryTerm(NamedTuple):
    name: str
    formula: str
    bytes: float


@dataclass(frozen=True)
class MemoryEstimate:
    """A config's on `ranks` devices: `phases()`, `peak()`, both in bytes per rank; `evaluated`:
    prompts decoded together in an evaluation.
    """

    cfg: Config
    shape: DecoderConfig
    ranks: int
    gpu: bool = True

    def __post_init__(self):
        c = self.cfg
        s = self.shape
        kind = c.model.compute
        put = self.__dict__.update  # frozen: what follows from the fields, once
        put(
            e=2 if kind == "bfloat16" or kind == "auto" and self.gpu else 4,
            W=self.ranks,
            L=s.num_hidden_layers,
            C=s.hidden_size,
            F=s.intermediate_size,
            V=s.vocab_size,
            H=s.num_attention_heads,
            K=s.num_key_value_heads,
            D=s.head_dim,
            p=c.prompt.max_tokens,
            G=c.sampling.group_size,
            inputs=c.sampling.max_new_tokens - 1,
            prompts=ceil(c.train.prompts_per_step / self.ranks),
        )
        (R, r), *blocks = _count_weights(s, c.train.frozen)
        put(
            R=R + r,
            U=sum(blocks[0]),
            P=R + r + sum(map(sum, blocks)),
            R1=R,
            U1=max(u for u, _ in blocks),
            P1=R + sum(u for u, _ in blocks),
            longest=self.p + self.inputs + 1,
            evaluated=min(ROWS_AT_ONCE, max(64, self.prompts * self.G)),
        )
        put(group=self.p + self.G * self.inputs)
        put(step_tokens=ceil(self.prompts / c.train.inner_steps) * self.group)

    # --- terms that several moments share ----------------------------------------------------------------------------------------

    def state(self, grads: float = 0, cache: bool = True) -> list[MemoryTerm]:
        # a rank's numbers; of the zeros at a unit's end nothing is said
        c = self.cfg
        n = self.P / self.W
        kept = cache and not self.gpu and not c.train.replay
        return [
            MemoryTerm("master weights", "4 P/W  (fsdp.Unit.shard)", 4 * n),
            MemoryTerm(
                "Adam's moments",
                "8 P'/W  (optim.py); optimizer.on_host: 0",
                8 * self.P1 / self.W * (not c.optimizer.on_host),
            ),
            MemoryTerm(
                "reference",
                "e P/W  (load_reference); loss.reference_on_host: 0",
                self.e * n * (c.loss.kl > 0 and not c.loss.reference_on_host),
            ),
            MemoryTerm(
                "gradients",
                "4 P'/W  (shard.grad), once a micro-batch is behind; train.reduce=step: 4 P', whole",
                grads,
            ),
            MemoryTerm(
                "cache, kept",
                "2 e L K D rows slots  (train.py: on a CPU it stays for the next step)",
                self.stores()[-1] * kept,
            ),
        ]

    def gathered(self, blocks: int) -> list[MemoryTerm]:
        e = 0 if self.W == 1 and self.e == 4 else self.e  # the shard is the whole and has the type
        return [
            MemoryTerm("gathered root", "e R  (Sharded.root)", e * self.R),
            MemoryTerm(
                "gathered blocks",
                "2 e U, and e U/W where W > 1: the running one, the next and its shard; all L in sampling",
                e * self.U * (blocks + (self.W > 1) / self.W),
            ),
        ]

    def attention(self, rows: list[tuple], grad: bool) -> tuple[float, float]:
        """Of one layer's attend(): bytes that autograd keeps, and what its largest call takes
        beside that while it runs.

        The library's temporaries: SDPA with a mask is on a CPU its flash kernel (keeps out,
        logsumexp and the mask as numbers; runs d q, k, v and a copy of d out). On a GPU no fused
        kernel but cuDNN's takes a mask with grouped heads (sdp_utils.cpp), so the plain formula is
        counted: q, k, v in float32 with heads repeated, softmax (B, H, T, S) in float32; twice that
        more while it runs.
        """
        H = self.H
        K = self.K
        D = self.D
        e = self.e
        kept = []
        running = []
        for B, T, S, masks in rows:
            scores = B * H * T * S
            padded = e * B * D * (T * H + 2 * S * K)
            if T * S <= SHORT_ROWS:  # _attend's own: matmul's reshape repeats heads
                kept.append(e * (B * H * D * (T + 2 * S) + scores))
                running.append(2 * e * scores)
            elif self.gpu and H != K:
                kept.append(4 * (B * H * D * (T + 2 * S) + scores))
                running.append(8 * scores)
            else:
                kept.append(padded + B * H * T * (e * D + 4) + e * masks * T * S)
                running.append(padded + e * B * H * T * D if grad else 0)
        return (sum(kept), max(running)) if grad else (0, max(k + r for k, r in zip(kept, running)))

    def forward_only(self, M: float, rows: list[tuple]) -> MemoryTerm:
        attention = (
            self.e * M * (2 * self.C + (2 * self.H + 3 * self.K) * self.D)
            + self.attention(rows, False)[1]
        )
        return MemoryTerm(
            "one block's forward",
            "e M (2 C + 3 F), or attention: e M (2 C + (2 H + 3 K) D) + padded rows",
            max(self.e * M * (2 * self.C + 3 * self.F), attention),
        )

    def head(self, N: float, gradient: bool) -> Iterator[list[MemoryTerm]]:
        """The moments of kernels/logprob.py's forward; with `gradient` those of one_shot."""
        device = "cuda" if self.gpu else "cpu"
        e = self.e
        d_weight = 4 * self.V * self.C
        space = min(WORKSPACE_BYTES[device], N * self.V * e)
        both = [
            MemoryTerm("selected hidden", "e N C  (policy._head_inputs)", e * N * self.C),
            MemoryTerm("logits workspace", "e n V <= logprob.WORKSPACE", space),
        ]
        if gradient:
            both += [
                MemoryTerm("head: d hidden", "e N C", e * N * self.C),
                MemoryTerm("head: d weight", "4 V C", d_weight),
            ]
        copies = 3 + (e == 2 or self.cfg.sampling.temperature != 1)
        yield both + [
            MemoryTerm(
                "policy on a block",
                "4 b V <= logprob.BLOCK: exp twice, entropy's product; scaled unless it is the logits",
                copies * min(BLOCK_BYTES[device], space * 4 / e),
            )
        ]
        if gradient and e == 2:
            yield both + [
                MemoryTerm(
                    "head: d weight's cast",
                    "e V C; on a CPU a product and its float32 copy more  (_add_product)",
                    e * self.V * self.C + d_weight * (not self.gpu),
                )
            ]

    def micro_batch(self) -> tuple[float, float, list[tuple], bool]:
        """M, N, attention's rows (B, T, S, masks), and whether it is the only one of its optimiser
        step. Fractions of a group: lengths vary.
        """
        budget = self.cfg.train.tokens_per_micro_batch
        share = ceil(self.prompts / self.cfg.train.inner_steps)
        groups, texts = (
            (min(share, budget / self.group),) * 2
            if self.group <= budget
            else (1, (budget - self.p) / self.inputs / self.G)
        )
        B = texts * self.G
        rows = [(groups, round_up(self.p, ROW_MULTIPLE), round_up(self.p, SLOT_MULTIPLE), 1)] + [
            (
                B,
                round_up(self.inputs, ROW_MULTIPLE),
                round_up(self.p + self.inputs, SLOT_MULTIPLE),
                B,
            )
        ] * (self.inputs > 0)
        return (
            groups * self.p + B * self.inputs,
            B * (self.inputs + 1),
            rows,
            self.step_tokens <= budget,
        )

    # --- moments -----------------------------------------------------------------------------------------------------------------

    def training(self) -> Iterator[list[MemoryTerm]]:
        M, N, rows, only = self.micro_batch()
        e = self.e
        C = self.C
        F = self.F
        checkpointing = self.cfg.train.checkpointing
        kept, running = self.attention(rows, True)
        norms = 2 * M * C * (4 + 2 * e) + M * (self.H + self.K) * self.D * (4 + e) * (
            self.shape.family == "qwen3"
        )
        block = norms + kept + e * M * (self.H * self.D + 4 * F)
        one = "2 M C (4 + 2 e) + e M (4 F + H D) + attention's rows"
        saved = MemoryTerm(
            "activations kept",
            "L e M C  (blocks' inputs)" if checkpointing else f"L x ({one})",
            self.L * (e * M * C if checkpointing else block),
        )
        step = self.cfg.train.reduce == "step"
        before = 4 * self.P1 * (1 if step else 1 / self.W) * (not only)
        # bytes of a number; 0: units add to what is held already
        vector = 0 if step and not only else 4 + 4 / self.W * (self.W > 1)
        shared = self.gathered(2) + [
            MemoryTerm("rope", "2 e M D", 2 * e * M * self.D),
            MemoryTerm(
                "layout",
                "8 B (T + S) ids, B T S masks  (PackedAttention)",
                sum(8 * B * (T + S) + masks * T * S for B, T, S, masks in rows),
            ),
        ]
        last_norm = MemoryTerm("last norm", "M C (4 + e)", M * C * (4 + e))
        for moment in self.head(N, self.cfg.model.head == "one_shot"):
            yield self.state(before) + shared + [saved, last_norm] + moment
        if self.cfg.model.head == "recompute":
            space = min(SLICE_BYTES["cuda" if self.gpu else "cpu"], N * self.V * e)
            yield (
                self.state(before)
                + shared
                + [
                    saved,
                    last_norm,
                    MemoryTerm("selected hidden", "e N C  (policy._head_inputs)", e * N * C),
                    MemoryTerm(
                        "logits workspace",
                        "e N v <= logprob.SLICE, and 4 N v when e = 2",
                        space * (3 if e == 2 else 1),
                    ),
                    MemoryTerm(
                        "head: d hidden",
                        "4 N C, and e N C when it is cast",
                        (4 + e * (e == 2)) * N * C,
                    ),
                    MemoryTerm("head: d weight", "e V C", e * self.V * C),
                ]
            )
        once = block if checkpointing else 0
        mlp = e * (M * (C + 2 * F) + F * C)
        attend = (
            running
            - e * 4 * M * F
            - M * C * (4 + 2 * e)
            + e * (2 * M * C + 3 * F * C + C * self.H * self.D)
        )
        flight = MemoryTerm(
            "gradient under way",
            "4 U' (1 + 1/W)  (Sharded._reduce: while the block before runs)",
            vector * self.U1,
        )
        d_weight = MemoryTerm("head: d weight", "e V C, until the root's reduction", e * self.V * C)
        yield (
            self.state(before)
            + shared
            + [
                saved,
                last_norm,
                MemoryTerm("head: d hidden", "e N C", e * N * C),
                d_weight,
                MemoryTerm(
                    "head: d weight once more",
                    "e V C, as the gradient of head[:reachable]",
                    d_weight.bytes,
                ),
            ]
        )
        root = max(
            2 * d_weight.bytes,
            d_weight.bytes * (2 - self.shape.tie_word_embeddings) + vector * self.R1,
        )
        # blocks whose backward is over, the last one's gradient under way: the last block, the one
        # before, the first
        for behind in (0, 1, self.L - 1):
            left = saved._replace(bytes=saved.bytes * (1 - behind / self.L))
            common = (
                self.state(4 * self.U1 / self.W * max(0, behind - 1) if only else before)
                + shared
                + [left, d_weight, flight._replace(bytes=flight.bytes * (behind > 0))]
            )
            yield common + [
                MemoryTerm("block computed again", one, once),
                MemoryTerm(
                    "block's backward",
                    "e (M (C + 2 F) + C F), or attention's where that is more",
                    max(mlp, attend),
                ),
            ]
            yield common + [
                MemoryTerm(
                    "block's gradient", "e U' as computed, 4 U' as reduced", (e + vector) * self.U1
                )
            ]
        yield (
            self.state(before if not only else 4 * (self.P1 - self.R1) / self.W)
            + self.gathered(0)
            + [
                flight,
                MemoryTerm(
                    "root's gradient",
                    "e V C of the embedding and of the head, one where tied, and 4 R' as reduced",
                    root,
                ),
            ]
        )

    def stores(self, rows: int = 0, group: int = 0) -> list[float]:
        """Bytes of the sampler's cache as it grows: after the prompts, after the siblings part, at
        the end (cache._reserve).
        """
        prompts = rows or self.prompts
        group = group or self.G
        most = count_slots(self.longest)
        slot = 2 * self.e * self.L * self.K * self.D
        all = min(
            prompts * group,
            int(self.cfg.sampling.cache_gib * 2**30 / slot) // most or prompts * group,
        )
        prompts = min(prompts, all)
        have = 0
        room = 0
        found = []
        for need, width in (
            (prompts, count_slots(self.p)),
            (all, count_slots(self.p + 1)),
            (all, count_slots(self.p + self.inputs)),
        ):
            have = have if need <= have else max(need, min(2 * need, all))
            room = room if width <= room else max(width, min(2 * width, most))
            found.append(slot * have * room)
        return found

    def sampling(self, rows: int = 0, group: int = 0) -> Iterator[list[MemoryTerm]]:
        prompts = rows or self.prompts
        group = group or self.G
        base = self.state(cache=rows > 0) + self.gathered(self.L)
        if not self.gpu and self.e == 4:
            base.append(
                MemoryTerm(
                    "weights in oneDNN's order",
                    "e (L U + V C)  (linear.sampling)",
                    self.e * (self.L * self.U + self.V * self.C),
                )
            )
        B, first, parted, last = prompts * group, *self.stores(rows, group)
        store = "2 e L K D rows slots  (KVCache.kv)"
        held = MemoryTerm(
            "distribution", "8 B V of the token before  (sample.generate)", 8 * B * self.V
        )
        yield base + [
            MemoryTerm("cache", store, first),
            self.forward_only(
                prompts * self.p,
                [(prompts, round_up(self.p, ROW_MULTIPLE), round_up(self.p, SLOT_MULTIPLE), 1)],
            ),
        ]
        yield base + [
            MemoryTerm("cache", store, parted),
            held,
            MemoryTerm(
                "rows copied",
                "2 e L K D (B - P) p  (KVCache.reorder)",
                2 * self.e * self.L * self.K * self.D * (B - prompts) * self.p,
            ),
        ]
        for old, new in ((first, parted), (parted, last)):
            if old != new:
                yield base + [
                    MemoryTerm("cache", store, new),
                    held,
                    MemoryTerm(
                        "cache before it grew", "copied from, then freed  (KVCache._reserve)", old
                    ),
                ]
        warm = group > 1 and self.cfg.sampling.temperature != 1
        yield base + [
            MemoryTerm("cache", store, last),
            held,
            MemoryTerm(
                "policy",
                "(8 + e) B V: logits, scaled, exp  (policy.policy)",
                (8 + self.e * (self.e == 2 or warm)) * B * self.V,
            ),
        ]

    def phases(self) -> dict[str, list[MemoryTerm]]:
        """{phase: the terms of its largest moment}."""
        M, N, rows, _ = self.micro_batch()
        grads = 4 * self.P1 / self.W
        biggest = max(self.R1, self.U1) / self.W
        host = self.cfg.optimizer.on_host
        moments = {
            "loading": [
                [t for t in self.state(cache=False) if t.name in ("master weights", "reference")]
                + [MemoryTerm("a weight read", "4 V C", 4 * self.V * self.C)]
            ],
            "sampling": self.sampling(),
            "evaluation": self.sampling(self.evaluated, 1),
            "scoring": [
                self.state() + self.gathered(2) + moment
                for moment in ([self.forward_only(M, rows)], *self.head(N, False))
            ],
            "training": self.training(),
            "update": [
                self.state(grads)
                + [
                    MemoryTerm(
                        "moments on their way",
                        "2 x 8 n of the largest shard  (offload.py)",
                        16 * biggest * host,
                    ),
                    MemoryTerm(
                        "gradient norm",
                        "8 n of the largest shard, on a CPU  (_foreach_norm in float64)",
                        8 * biggest * (not self.gpu),
                    ),
                ]
            ],
        }
        return {phase: max(found, key=sum_bytes) for phase, found in moments.items()}

    def peak(self) -> float:
        return max(map(sum_bytes, self.phases().values()))


@lru_cache
def _count_weights(shape: DecoderConfig, frozen: str) -> list[list[int]]:
    """[trained, frozen] weights of the root, then of each block."""
    with torch.device("meta"):
        units = params_by_block(
            Decoder(shape), tuple(filter(None, map(str.strip, frozen.split(","))))
        )
    return [
        [sum(getattr(module, attribute).numel() for _, module, attribute in some) for some in unit]
        for unit in units
    ]


def sum_bytes(terms: list[MemoryTerm]) -> float:
    return sum(t.bytes for t in terms)


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
