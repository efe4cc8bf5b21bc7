"""Score completions, the chain that all tasks share.

Sampled ids -> text -> answer -> ranking -> terms of the reward -> Reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recr1.data_types import Prompt, Reward, Rollout
from recr1.retrieval.interface import Retriever
from recr1.tasks.registry import Task
from recr1.tasks.rewards import RewardTerms, compute_overlong_penalty

# Scored completions that are remembered. A reward is taken to depend on the query and the sampled
# ids alone: a term that draws random numbers or looks at the step is computed once for each pair.
MAX_REMEMBERED = 500_000


class Scorer:
    """Score the completions of a task.

    Args:
        qrels: the judgements, {query id: {document id: gain}}.
        terms: measures a ranking.
        decode: maps token ids to text.
        stops: the end tokens, which are no part of the text.
        limit: the number of tokens at which sampling cuts.
        thought_closed: the prompt has ended the thought, so a completion is the answer alone.
    """

    def __init__(
        self,
        task: Task,
        retriever: Retriever,
        qrels: dict[str, dict[str, float]],
        terms: RewardTerms,
        decode: Callable[[Sequence[int]], str] = str,
        stops: frozenset[int] = frozenset(),
        limit: int = 0,
        thought_closed: bool = False,
    ):
        self.task = task
        self.retriever = retriever
        self.qrels = qrels
        self.terms = terms
        self.decode = decode
        self.stops = stops
        self.limit = limit
        self.text_before = "</think>" if thought_closed else ""
        self.known_rewards: dict[tuple[str, tuple[int, ...]], Reward] = {}
        self.baseline_ndcg: dict[str, float] = {}  # by the query's id

    def score(self, rollouts: list[Rollout]) -> list[Reward]:
        """Return one Reward per rollout.

        A completion that was scored before for its query has the same Reward again.
        """
        if len(self.known_rewards) > MAX_REMEMBERED:
            self.known_rewards.clear()

        new_rollouts: dict[tuple[str, tuple[int, ...]], Rollout] = {}
        for rollout in rollouts:
            key = (rollout.prompt.id, rollout.ids)
            if key not in self.known_rewards:
                new_rollouts[key] = rollout

        prompts = []
        texts = []
        penalties = []
        for rollout in new_rollouts.values():
            prompts.append(rollout.prompt)
            texts.append(self._decode_text(rollout))
            penalties.append(self._compute_penalty(rollout))
        new_rewards = self.score_texts(prompts, texts, penalties)
        self.known_rewards.update(zip(new_rollouts, new_rewards))

        return [self.known_rewards[rollout.prompt.id, rollout.ids] for rollout in rollouts]

    def score_texts(
        self, prompts: list[Prompt], texts: list[str], penalties: list[float]
    ) -> list[Reward]:
        """Return one Reward per completion, whatever its text holds.

        Args:
            penalties: added to each completion's total (overlong).
        """
        # Only a completion with an answer is ranked.
        answers = []
        errors = []
        for prompt, text in zip(prompts, texts):
            answer, error = self.task.parse(self.text_before + text, prompt.row)
            answers.append(answer)
            errors.append(error)
        parsed = [i for i, error in enumerate(errors) if error is None]
        parsed_terms = self.score_answers(
            [prompts[i] for i in parsed], [answers[i] for i in parsed]
        )
        terms_of = dict(zip(parsed, parsed_terms))

        rewards = []
        for i, text in enumerate(texts):
            reward = self.terms.make_reward(
                text, answers[i], errors[i], terms_of.get(i), penalties[i]
            )
            rewards.append(reward)
        return rewards

    def score_answers(self, prompts: list[Prompt], answers: list) -> list[dict[str, float]]:
        """Return the reward terms of each answer's ranking, with the judgements of its query."""
        if not prompts:
            return []
        if self.terms.needs_baseline:
            self._measure_baseline(prompts)
        terms = []
        for prompt, answer, ranked in zip(prompts, answers, self._rank(prompts, answers)):
            gains = self.qrels.get(prompt.id, {})
            baseline_ndcg = self.baseline_ndcg.get(prompt.id, 0.0)
            terms.append(self.terms(prompt.row, answer, ranked, gains, baseline_ndcg))
        return terms

    def _measure_baseline(self, prompts: list[Prompt]) -> None:
        """Measure the NDCG of each query's answer without a policy, once."""
        new_prompts = {}
        for prompt in prompts:
            if prompt.id not in self.baseline_ndcg:
                new_prompts[prompt.id] = prompt
        if not new_prompts:
            return
        unmeasured = list(new_prompts.values())
        answers = [self.task.baseline_answer(prompt.row) for prompt in unmeasured]
        for prompt, ranked in zip(unmeasured, self._rank(unmeasured, answers)):
            gains = self.qrels.get(prompt.id, {})
            self.baseline_ndcg[prompt.id] = self.terms.compute_ndcg(ranked, gains)

    def _rank(self, prompts: list[Prompt], answers: list) -> list[list[str]]:
        """Return the ranking of each answer."""
        rows = [prompt.row for prompt in prompts]
        return self.task.rank(answers, rows, self.terms.k, self.search)

    def search(self, queries: list[str], k: int) -> list[list[str]]:
        """Return the document ids of each query's hits, best first."""
        indices, _scores = self.retriever.search(queries, k)  # (Q, k), -1 after the last hit
        doc_ids = self.retriever.doc_ids
        rankings = []
        for query_indices in indices.tolist():
            rankings.append([doc_ids[index] for index in query_indices if index >= 0])
        return rankings

    def _decode_text(self, rollout: Rollout) -> str:
        """Decode a completion without its end token."""
        ids = rollout.ids
        if ids[-1] in self.stops:
            ids = ids[:-1]
        return self.decode(ids)

    def _compute_penalty(self, rollout: Rollout) -> float:
        """Compute the overlong penalty of a completion; the end token counts."""
        return compute_overlong_penalty(
            len(rollout.ids), self.limit, self.terms.rule.overlong_buffer
        )
