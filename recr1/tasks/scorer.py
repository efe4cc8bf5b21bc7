"""What all tasks share: sampled ids -> text -> answer -> ranking -> the parts of the reward ->
Reward.
"""

from typing import Callable, Sequence

from recr1.data_types import Prompt, Reward, Rollout
from recr1.retrieval.interface import Retriever
from recr1.tasks.rewards import RewardTerms, compute_overlong_penalty

MAX_REMEMBERED = (
    500_000  # scored completions kept: a reward depends on the query and the text alone
)


class Scorer:
    """Scores completions of a task. `qrels` {query id: {document id: gain}}; `decode` maps token
    ids to text; limit: the length at which sampling cuts; thought_closed: the prompt has ended the
    thought, a completion is the answer alone.
    """

    def __init__(
        self,
        task,
        retriever: Retriever,
        qrels: dict[str, dict[str, float]],
        parts: RewardTerms,
        decode: Callable[[Sequence[int]], str] = str,
        stops: frozenset[int] = frozenset(),
        limit: int = 0,
        thought_closed: bool = False,
    ):
        self.task = task
        self.retriever = retriever
        self.qrels = qrels
        self.parts = parts
        self.decode = decode
        self.stops = stops
        self.limit = limit
        self.before = "</think>" if thought_closed else ""
        self.known: dict[tuple[str, tuple[int, ...]], Reward] = {}

    def score(self, rollouts: list[Rollout]) -> list[Reward]:
        """One Reward per rollout; one that it has seen is not searched again."""
        if len(self.known) > MAX_REMEMBERED:
            self.known.clear()
        new = {(r.prompt.id, r.ids): r for r in rollouts if (r.prompt.id, r.ids) not in self.known}
        texts = [
            self.decode(r.ids[:-1] if r.ids[-1] in self.stops else r.ids) for r in new.values()
        ]
        late = [
            compute_overlong_penalty(len(r.ids), self.limit, self.parts.rule.overlong)
            for r in new.values()
        ]
        self.known |= zip(new, self.score_texts([r.prompt for r in new.values()], texts, late))
        return [self.known[r.prompt.id, r.ids] for r in rollouts]

    def score_texts(
        self, prompts: list[Prompt], texts: list[str], late: list[float]
    ) -> list[Reward]:
        """One Reward per completion, whatever its text holds."""
        parsed = [self.task.parse(self.before + text, p.row) for p, text in zip(prompts, texts)]
        good = [i for i, (_, error) in enumerate(parsed) if error is None]
        parts = dict(
            zip(good, self.score_answers([prompts[i] for i in good], [parsed[i][0] for i in good]))
        )
        return [
            self.parts.reward(text, *parsed[i], parts.get(i), late[i])
            for i, text in enumerate(texts)
        ]

    def score_answers(self, prompts: list[Prompt], answers: list) -> list[dict[str, float]]:
        """The parts of each answer's ranking, judged for its query."""
        ranked = (
            self.task.rank(answers, [p.row for p in prompts], self.parts.k, self.search)
            if prompts
            else []
        )
        return [
            self.parts(p.row, answer, found, self.qrels.get(p.id, {}))
            for p, answer, found in zip(prompts, answers, ranked)
        ]

    def search(self, queries: list[str], k: int) -> list[list[str]]:
        """Document ids of each query, best first."""
        # (Q, k), -1 where there are no more hits
        rows = self.retriever.search(queries, k)[0]
        names = self.retriever.doc_ids
        return [[names[i] for i in row if i >= 0] for row in rows.tolist()]
