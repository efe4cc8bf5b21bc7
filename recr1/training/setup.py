"""From a config to a run: everything is built and checked here, before the first step."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recr1.config import loader as configs
from recr1.config.schema import Config
from recr1.data.chat_template import ChatTemplate
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.fsdp import Sharded
from recr1.distributed.printing import print_rank0
from recr1.distributed.process_group import set_collective_timeout
from recr1.kernels.availability import choose_backend
from recr1.memory import measure as memory, plan
from recr1.memory.estimate import MemoryEstimate
from recr1.model.decoder import ScoredDecoder
from recr1.model.hf_config import read_config
from recr1.model.lora import FrozenReference
from recr1.retrieval.factory import RETRIEVERS_WITH_INDEX, build_retriever, get_index_dir
from recr1.retrieval.interface import NoRetriever, Retriever
from recr1.rl.losses import resolve_objective
from recr1.rl.replay import Replay
from recr1.tasks.prompts import load_prompts
from recr1.tasks.registry import Task, build_task
from recr1.tasks.rewards import RewardTerms, read_item_table
from recr1.tasks.scorer import Scorer
from recr1.tracking.run_log import RunLog
from recr1.tracking.trackers import Tracker
from recr1.training.checks import check_kernels, check_kv_cache, check_lengths, count_slot_bytes
from recr1.training.launch import EXPECTED_ERRORS
from recr1.training.load_model import (
    load_policy,
    load_reference,
    make_adapter_source,
    resolve_compute_dtype,
)
from recr1.training.run import Dataset, RetrieverFactory, Run, RunParts
from recr1.training.run_dir import RunError, claim_run_dir
from recr1.training.summary import describe_bias
from recr1.training.validation import Evaluator
from recr1.utils.files import report_write_errors, write_text
from recr1.utils.hf_hub import load_tokenizer, read_stop_token_ids, resolve_model_folder
from recr1.utils.interrupts import raise_on_signal


def setup_run(cfg: Config, loop: str = "train") -> Run:
    """Build and check everything that a run needs before its first step. A collective.

    A setting that cannot work raises here, on every rank, before anything is written.

    Args:
        loop: train (GRPO) or sft.
    """
    configs.check_settings_used(cfg, loop)
    started = time.perf_counter()
    threads = configure_process(cfg)
    folder = Path(cfg.run.dir)
    has_earlier_run = claim_folder_and_models(cfg, folder)
    parts = build_parts(cfg)

    # All that can be wrong with the config is found: from here on the run writes.
    is_resumed = dist.broadcast_from_rank0(has_earlier_run)
    tracker = open_run_dir(cfg, folder)
    retriever = open_retriever(cfg, folder, parts.make_retriever)
    log = RunLog(folder, loop)
    set_collective_timeout(cfg.run.collective_timeout)

    footprint = estimate_memory(cfg, parts.policy)
    eval_scorer = build_scorer(parts, retriever, parts.eval_terms)
    run = Run(
        **vars(parts),
        loop=loop,
        folder=folder,
        is_resumed=is_resumed,
        started=started,
        threads=threads,
        retriever=retriever,
        scores_async=scores_beside_sampling(cfg),
        train_scorer=build_scorer(parts, retriever, parts.train_terms),
        evaluator=build_evaluator(parts, eval_scorer, log, footprint.evaluated, is_resumed),
        log=log,
        tracker=tracker,
        footprint=footprint,
        num_steps=cfg.train.steps,
    )
    print_setup(run)
    return run


# --- Before anything is written -------------------------------------------------------------------


def configure_process(cfg: Config) -> int:
    """Set this rank's threads, how a CPU keeps memory, and what run.deterministic asks for.

    Returns the number of threads.
    """
    cores = os.cpu_count() or 1
    threads = cfg.run.threads or max(1, cores // dist.local_world_size())
    torch.set_num_threads(threads)
    if dist.device().type == "cpu":
        memory.keep_freed_pages()
    if cfg.run.deterministic:
        use_deterministic_algorithms()
    return threads


def use_deterministic_algorithms() -> None:
    """Let torch make every sum in one order, where it can; where it cannot it warns.

    It must not raise: by torch 2.13's documentation it does so at every cumsum of floats on a GPU,
    which the sampler needs. Several rows are added in one order there, only a single row is not
    (pytorch issue 89492).
    """
    # cuBLAS' own condition; read when it first multiplies
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def claim_folder_and_models(cfg: Config, folder: Path) -> bool:
    """Check that run.dir may be used, and download what is named by a hub id.

    Returns whether the folder holds an unfinished run of this config; rank 0 alone looks.
    """
    has_earlier_run = False
    with dist.fail_together(), raise_on_signal():
        if dist.rank() == 0:
            has_earlier_run = claim_run_dir(folder, cfg)
        if dist.local_rank() == 0:  # one rank of a machine downloads
            resolve_model_folder(cfg.model.path)
            if cfg.retriever.encoder:
                resolve_model_folder(cfg.retriever.encoder, "retriever.encoder")
    return has_earlier_run


def build_parts(cfg: Config) -> RunParts:
    """Read, build and check all that the config names; write nothing."""
    with dist.fail_together(), raise_on_signal():
        model_folder = resolve_model_folder(cfg.model.path)
        tokenizer = load_tokenizer(model_folder)
        stops = read_stop_token_ids(model_folder, tokenizer)
        task = build_task(cfg)
        chat = build_chat_template(cfg, tokenizer, task)
        dataset = Dataset(*load_prompts(cfg, chat, task))
        train_terms, eval_terms = build_reward_terms(cfg)
        check_lengths(cfg, read_config(model_folder).max_position_embeddings)
        compute_dtype = resolve_compute_dtype(cfg.model.compute)
        policy = build_policy(cfg, model_folder, len(tokenizer), compute_dtype)
        reference = build_reference(cfg, policy, model_folder, len(tokenizer), compute_dtype)
        slot_bytes = count_slot_bytes(policy.config, compute_dtype)
        check_kv_cache(cfg, slot_bytes)
        replay = build_replay(cfg)
        objective = resolve_objective(cfg.loss, cfg.model)
        check_kernels(cfg)
        make_retriever = choose_retriever(cfg, task)
    return RunParts(
        cfg=cfg,
        tokenizer=tokenizer,
        stops=stops,
        task=task,
        chat=chat,
        dataset=dataset,
        train_terms=train_terms,
        eval_terms=eval_terms,
        compute_dtype=compute_dtype,
        policy=policy,
        reference=reference,
        slot_bytes=slot_bytes,
        replay=replay,
        objective=objective,
        make_retriever=make_retriever,
    )


def build_chat_template(cfg: Config, tokenizer: Any, task: Task) -> ChatTemplate:
    """Build what turns a row of the data into the token ids of a prompt."""
    prompt = cfg.prompt
    return ChatTemplate(tokenizer, prompt.system, prompt.user, prompt.assistant, task.placeholders)


def build_reward_terms(cfg: Config) -> tuple[RewardTerms, RewardTerms]:
    """Build the terms of the reward for training, and all terms for evaluation."""
    items = read_item_table(cfg)
    train_terms = RewardTerms(cfg.reward, cfg.reward.k_train, items)
    eval_terms = RewardTerms(cfg.reward, cfg.reward.k_eval, items, every=True)
    return train_terms, eval_terms


def build_policy(
    cfg: Config, model_folder: str, vocab_size: int, compute_dtype: torch.dtype
) -> Sharded:
    """Load the trained model, sharded over the ranks, with float32 masters."""
    return load_policy(
        model_folder,
        vocab_size,
        compute_dtype,
        cfg.train.gradient_checkpointing,
        cfg.train.frozen,
        cfg.model.attention,
        cfg.model.batch_invariant,
        cfg.model.head_float32,
        cfg.model.kernels,
        make_adapter_source(cfg),
    )


def build_reference(
    cfg: Config, policy: Sharded, model_folder: str, vocab_size: int, compute_dtype: torch.dtype
) -> ScoredDecoder | None:
    """Load the frozen policy before training, which the KL needs; None without a KL.

    With LoRA it is the policy's own weights without the adapters.
    """
    if not cfg.loss.kl_coef > 0:
        return None
    if cfg.lora.rank:
        return FrozenReference(policy)
    return load_reference(
        model_folder,
        vocab_size,
        compute_dtype,
        cfg.loss.reference_cpu_offload,
        cfg.model.attention,
        cfg.model.batch_invariant,
        cfg.model.head_float32,
        cfg.model.kernels,
    )


def build_replay(cfg: Config) -> Replay | None:
    """Open the logged rollouts that train.replay names; None where the policy samples."""
    if not cfg.train.replay:
        return None
    return Replay(cfg.train.replay, cfg.sampling.group_size)


def choose_retriever(cfg: Config, task: Task) -> RetrieverFactory:
    """Return what makes the retriever of a corpus; of none for a task that searches nothing."""
    if not task.uses_retriever:
        return NoRetriever.make
    return build_retriever(cfg.retriever)


# --- What writes ----------------------------------------------------------------------------------


def open_run_dir(cfg: Config, folder: Path) -> Tracker:
    """Make run.dir with its config.yaml, start the tracker and rank 0's heartbeat."""
    with dist.fail_together(), raise_on_signal():
        if dist.rank() == 0:
            with report_write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.yaml", configs.dump_config(cfg))
            start_heartbeat(folder)
        return Tracker(cfg, folder)


def start_heartbeat(folder: Path) -> None:
    """Start this rank's heartbeat: what the other ranks name when this one is lost."""
    with report_write_errors(folder):
        heartbeat.start_heartbeat(folder / "heartbeats", dist.rank(), dist.world_size())


def open_retriever(cfg: Config, folder: Path, make_retriever: RetrieverFactory) -> Retriever:
    """Open the retriever over the corpus. One rank of a machine builds the index, all load it.

    The other ranks' heartbeats start here, where run.dir exists.
    """
    with dist.fail_together(), raise_on_signal():
        if dist.rank() > 0:
            start_heartbeat(folder)
        if dist.local_rank() == 0 and cfg.retriever.kind in RETRIEVERS_WITH_INDEX:
            make_over_corpus(cfg, folder, make_retriever)
    with dist.fail_together(), raise_on_signal():
        retriever, dropped_lines = make_over_corpus(cfg, folder, make_retriever)
    if dropped_lines:
        print_rank0(f"recr1: {dropped_lines}")
    return retriever


def make_over_corpus(
    cfg: Config, folder: Path, make_retriever: RetrieverFactory
) -> tuple[Retriever, str]:
    """Make the retriever over the config's corpus; what its packages raise becomes RunError."""
    index_dir = get_index_dir(cfg.retriever, folder)
    try:
        return make_retriever(cfg.data.corpus, cfg.data.on_bad_line, index_dir, print_rank0)
    except EXPECTED_ERRORS:
        raise
    except (ValueError, OSError) as e:
        raise RunError(f"retriever: {e}") from None


# --- What is built on top -------------------------------------------------------------------------


def build_scorer(parts: RunParts, retriever: Retriever, terms: RewardTerms) -> Scorer:
    """Build what turns rollouts into rewards."""
    # as sampled: Llama's tokenizer would drop spaces
    decode = partial(parts.tokenizer.decode, clean_up_tokenization_spaces=False)
    return Scorer(
        parts.task,
        retriever,
        parts.dataset.qrels,
        terms,
        decode,
        parts.stops,
        parts.cfg.sampling.max_new_tokens,
        parts.chat.thought_closed,
    )


def build_evaluator(
    parts: RunParts, scorer: Scorer, log: RunLog, prompts_at_once: int, is_resumed: bool
) -> Evaluator:
    """Build what evaluates the policy on the validation and the test split."""
    return Evaluator(
        cfg=parts.cfg,
        policy=parts.policy,
        validation=parts.dataset.validation,
        test=parts.dataset.test,
        scorer=scorer,
        log=log,
        prompts_at_once=prompts_at_once,
        slot_bytes=parts.slot_bytes,
        is_resumed=is_resumed,
    )


def scores_beside_sampling(cfg: Config) -> bool:
    """Return whether rewards are computed in a thread while others are still being sampled.

    On a CPU the policy and the retriever would only take each other's cores, unless the retriever
    is a function of a user's own.
    """
    return dist.device().type != "cpu" or ":" in cfg.retriever.kind


def estimate_memory(cfg: Config, policy: Sharded) -> MemoryEstimate:
    """Estimate what GRPO with this config needs on each rank, with the attention that it has."""
    on_gpu = dist.device().type == "cuda"
    cfg = plan.apply_overrides(cfg, {"model.attention": policy.backend.name})
    return MemoryEstimate(cfg, policy.config, dist.world_size(), gpu=on_gpu)


def print_setup(run: Run) -> None:
    """Print what the run trains, on what, and what it expects to need."""
    print_rank0(f"recr1: {format_setup(run)}")
    bias = describe_bias(run.cfg, run.loop)
    if bias:
        print_rank0(f"recr1: {bias}")
    if run.loop == "train":  # the footprint is GRPO's
        print_rank0(plan.format_announcement(run.footprint, memory.get_installed_bytes()))


def format_setup(run: Run) -> str:
    """Format the run's parts in one line."""
    cfg = run.cfg
    objective = run.objective
    loss = "SFT"
    beside_sampling = ""
    if run.loop == "train":
        loss = (
            f"loss {cfg.loss.kind} ({objective.surrogate.__name__}, "
            f"{objective.advantage.__name__}, {objective.agg_mode})"
        )
        if run.scores_async:
            beside_sampling = ", beside sampling"
    dtype = str(run.compute_dtype).removeprefix("torch.")
    kernels = choose_backend(cfg.model.kernels, dist.device())
    fused_loss = " (group_loss)" if objective.runs_in_kernel else ""
    train, validation, test, _ = run.dataset
    trained = f" ({run.policy.num_trained:,} trained)" if cfg.lora.rank else ""
    return (
        f"{run.policy.size:,} parameters{trained} in {dtype}, "
        f"{dist.world_size()} x {dist.device().type}, "
        f"{run.threads} threads each, attention {run.policy.backend}, {loss}, "
        f"head {cfg.model.head}, kernels {kernels}{fused_loss}, "
        f"{len(run.retriever.doc_ids)} documents, "
        f"retriever {run.retriever.description}{beside_sampling}, "
        f"queries: {len(train)} train, {len(validation)} validation, {len(test)} test"
    )
