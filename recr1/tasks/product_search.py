"""Product search, Rec-R1's first task: a shopper's words -> the policy's query -> a fixed retriever -> NDCG (arXiv 2503.24289, section 3)."""
from typing import Callable, Sequence

from ..answers import parse_query
from ..config import RewardRule
from ..grpo import overlong
from ..metrics import ndcg
from ..records import Reward, Rollout
from ..retrieval.base import Retriever

REMEMBERED = 500_000             # scored completions kept: a reward depends on the query and the text alone


class ProductSearch:
    """Scores completions. `qrels` {query id: {document id: gain}}; `decode` maps token ids to text; k is the depth of the ranking, limit
    the length at which sampling cuts."""

    def __init__(self, retriever: Retriever, qrels: dict[str, dict[str, float]], decode: Callable[[Sequence[int]], str],
                 stops: frozenset[int], rule: RewardRule, k: int, limit: int):
        self.retriever, self.qrels, self.decode, self.stops, self.rule, self.k, self.limit = retriever, qrels, decode, stops, rule, k, limit
        self.known: dict[tuple[str, tuple[int, ...]], Reward] = {}

    def score(self, rollouts: list[Rollout]) -> list[Reward]:
        """One Reward per rollout: bonus + NDCG@k, `miss` where it is 0, `unparsable` where there is no answer; less what is overlong. Never raises."""
        if len(self.known) > REMEMBERED:
            self.known.clear()
        new = {(r.prompt.id, r.ids): r for r in rollouts if (r.prompt.id, r.ids) not in self.known}
        texts = [self.decode(r.ids[:-1] if r.ids[-1] in self.stops else r.ids) for r in new.values()]
        parsed = [parse_query(text) for text in texts]
        answered = [(key[0], query) for key, (query, _) in zip(new, parsed) if query is not None]
        values = iter(self.metric([id for id, _ in answered], [query for _, query in answered]))
        for key, text, (query, error) in zip(new, texts, parsed):
            value = 0.0 if error else next(values)
            total = self.rule.unparsable if error else self.rule.bonus + value if value > 0 else self.rule.miss
            late = overlong(len(key[1]), self.limit, self.rule.overlong)
            parts = {"ndcg": value} | ({"overlong": late} if self.rule.overlong else {})
            self.known[key] = Reward(total + late, parts, error, query, text)
        return [self.known[r.prompt.id, r.ids] for r in rollouts]

    def metric(self, query_ids: list[str], texts: list[str]) -> list[float]:
        """NDCG@k of what the retriever returns for each text, judged for its query id."""
        if not texts:
            return []
        rows, _ = self.retriever.search(texts, self.k)                                       # (Q, k), -1 where there are no more hits
        names = self.retriever.doc_ids
        return [ndcg([names[i] for i in row if i >= 0], self.qrels.get(id, {}), self.k) for id, row in zip(query_ids, rows.tolist())]
