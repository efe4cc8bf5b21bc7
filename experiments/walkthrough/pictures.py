"""Draw the pictures of walkthrough.ipynb.

Each function draws one figure from what the functions of recr1 have returned. Nothing is computed
here but places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from recr1.retrieval.bm25.searcher import BM25Searcher

INK = "#222222"
GRAY = "#b8b8b8"
LIGHT_GRAY = "#e6e6e6"
BLUE = "#3b6fb6"
ORANGE = "#d9822b"
GREEN = "#3f9b5b"
plt.rcParams.update(
    {
        "figure.dpi": 100,
        "savefig.bbox": "tight",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GRAY,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }
)


def draw_tokens(pieces: list[tuple[str, list[str]]]) -> None:
    """Draw a prompt's tokens as boxes, colored by where they come from.

    pieces: [(origin, tokens), ...] in order.
    """
    origins = [origin for origin, _ in pieces]
    colors = dict(zip(origins, (GRAY, ORANGE, BLUE)))
    _, ax = plt.subplots(figsize=(9, 0.9))
    x = 0.0
    for origin, texts in pieces:
        for text in texts:
            width = _measure_box(text)
            box = plt.Rectangle(
                (x, 0),
                width,
                1,
                facecolor=colors[origin],
                alpha=0.35,
                edgecolor="white",
                linewidth=2,
            )
            ax.add_patch(box)
            _write_token(ax, x + width / 2, 0.5, text)
            x += width
    ax.set(xlim=(0, x), ylim=(0, 1))
    ax.axis("off")
    handles = []
    for origin, color in colors.items():
        handles.append(plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.35, label=origin))
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def draw_texts(
    rows: list[list[str]],
    values: list[Sequence[float]],
    names: list[str],
    title: str,
    unit: str,
    diverging: bool = False,
) -> None:
    """Draw sampled texts, a row each, a box per token colored by its value.

    Args:
        rows: the tokens of each text.
        values: of each token: log-probs (0 is certain), or what pushes a token up or down.
        names: of the rows.
        unit: name and unit of the values, written at the scale.
        diverging: the values have both signs.
    """
    all_values = np.concatenate([np.asarray(row_values, float) for row_values in values])
    if diverging:
        high = max(abs(all_values).max(), 1e-9)
        low = -high
        colormap = plt.cm.PiYG
    else:
        low = min(all_values.min(), -1.0)
        high = 0.0
        colormap = plt.cm.YlOrBr_r
    fig, ax = plt.subplots(figsize=(9, 0.35 + 0.3 * len(rows)), layout="constrained")
    for y, (texts, row_values) in enumerate(zip(rows, values)):
        x = 0.0
        for text, value in zip(texts, row_values):
            position = (value - low) / (high - low)  # on the scale, 0 to 1
            if not diverging:
                position = position * 0.9 + 0.1  # the darkest tenth hides the text
            shade = colormap(position)
            width = _measure_box(text)
            box = plt.Rectangle((x, y + 0.06), width, 0.88, facecolor=shade, edgecolor="none")
            ax.add_patch(box)
            luminance = np.dot(shade[:3], (0.3, 0.59, 0.11))
            color = "white" if luminance < 0.45 else INK
            _write_token(ax, x + width / 2, y + 0.5, text, color=color)
            x += width + 0.1
    longest_row = max(sum(0.1 + _measure_box(text) for text in texts) for texts in rows)
    ax.set(
        xlim=(0, longest_row),
        ylim=(len(rows), 0),
        yticks=np.arange(len(rows)) + 0.5,
        yticklabels=names,
        xticks=[],
        title=title,
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    scale = plt.cm.ScalarMappable(plt.Normalize(low, high), colormap)
    fig.colorbar(scale, ax=ax, fraction=0.02, pad=0.01, label=unit)


def _measure_box(text: str) -> float:
    """Return the width of a token's box."""
    return 0.8 + 0.42 * len(text)


def _write_token(ax: Axes, x: float, y: float, text: str, **style) -> None:
    """Write a token into its box; a dot stands for a space."""
    ax.text(
        x,
        y,
        text.replace(" ", "·"),
        ha="center",
        va="center",
        family="monospace",
        fontsize=8,
        parse_math=False,
        **style,
    )


def draw_hits(
    retriever: BM25Searcher,
    queries: list[str],
    title: Callable[[str], str],
    gains: dict[str, float],
    k: int = 6,
) -> None:
    """Draw the first k documents of each query: what each matched term adds to the score.

    Args:
        title: what is shown of a document, from its id.
        gains: {document id: relevance}; judged documents are green.
    """
    hits = []
    term_scores = []  # of each query's hits: [(term, score), ...]
    for query, rows in zip(queries, retriever.search(queries, k)[0].tolist()):
        query_hits = [row for row in rows if row >= 0]
        hits.append(query_hits)
        term_scores.append([retriever.explain(query, row) for row in query_hits])
    terms: dict[str, None] = {}  # in the order of their first use
    for query_scores in term_scores:
        for document_scores in query_scores:
            terms.update(dict.fromkeys(term for term, _ in document_scores))
    palette = dict(zip(terms, plt.cm.tab20(np.arange(len(terms)) % 20)))

    fig, axes = plt.subplots(
        1,
        len(queries),
        figsize=(9, 0.9 + 0.28 * k),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, query, rows, query_scores in zip(axes[0], queries, hits, term_scores):
        for y, document_scores in enumerate(query_scores):
            left = 0.0
            for term, score in document_scores:
                ax.barh(y, score, left=left, color=palette[term], edgecolor="white")
                left += score
        doc_ids = [retriever.doc_ids[row] for row in rows]
        ax.set(
            title=_shorten(query, 44),
            yticks=range(len(rows)),
            yticklabels=[_shorten(title(doc_id), 30) for doc_id in doc_ids],
            xlabel="BM25 score, by term",
        )
        ax.title.set_parse_math(False)
        ax.invert_yaxis()
        for label, doc_id in zip(ax.get_yticklabels(), doc_ids):
            label.set(color=INK, weight="normal", parse_math=False)
            if gains.get(doc_id, 0) > 0:
                label.set(color=GREEN, weight="bold")
    handles = [plt.Rectangle((0, 0), 1, 1, color=palette[term], label=term) for term in terms]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(8, len(terms)))


def _shorten(text: str, max_chars: int) -> str:
    """Cut a text at `max_chars`."""
    return text if len(text) <= max_chars else text[: max_chars - 2] + ".."


def draw_rankings(
    names: list[str],
    rankings: list[list[str]],
    gains: dict[str, float],
    values: list[float],
    metric: str,
    depth: int = 20,
) -> None:
    """Draw at which ranks of each ranking judged documents are, and what a rank is worth to NDCG.

    Args:
        gains: {document id: relevance}.
        values: of the full rankings, by the metric that `metric` names.
    """
    fig, axes = plt.subplots(
        len(names),
        1,
        figsize=(9, 1.4 * len(names)),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    discounts = 1 / np.log2(np.arange(1, depth + 1) + 1)
    for ax, name, ids, value in zip(axes[:, 0], names, rankings, values):
        colors = [GREEN if gains.get(id, 0) > 0 else LIGHT_GRAY for id in ids[:depth]]
        colors += [LIGHT_GRAY] * (depth - len(ids))
        ax.bar(range(1, depth + 1), discounts, color=colors)
        ax.set(title=f"{name}      {metric} {value:.3f}", yticks=[0, 1], ylabel="1 / log2(i + 1)")
        ax.title.set_parse_math(False)
    axes[-1, 0].set(
        xlabel="rank i (green: a judged document stands there)", xticks=range(1, depth + 1)
    )


def draw_advantages(
    rewards: Sequence[float], advantages: Sequence[float], names: list[str]
) -> None:
    """Draw a group's rewards with their mean, and the advantages that come of them."""
    _, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.7 + 0.26 * len(names)), sharey=True, layout="constrained"
    )
    y = np.arange(len(names))
    mean_reward = np.mean(rewards)
    left.barh(y, rewards, color=BLUE)
    left.axvline(mean_reward, color=INK, linestyle=":", label=f"mean {mean_reward:.3f}")
    left.legend(loc="lower left", bbox_to_anchor=(0.6, 1.0), borderaxespad=0)
    left.set(title="reward", yticks=y, yticklabels=names)
    colors = [GREEN if advantage > 0 else ORANGE for advantage in advantages]
    right.barh(y, advantages, color=colors)
    right.axvline(0, color=INK, linewidth=0.8)
    right.set(title="advantage: (reward - mean) / (std + floor)")
    right.tick_params(left=False)
    left.invert_yaxis()
    for label in left.get_yticklabels():
        label.set_parse_math(False)


def draw_clip(
    ratio: np.ndarray, surrogates: dict[float, np.ndarray], low: float, high: float
) -> None:
    """Draw what a token adds to the objective, over the ratio of its probabilities.

    surrogates: {advantage: (n,)}, at the ratios `ratio` (n,); low, high: the limits of the clip.
    """
    _, axes = plt.subplots(1, len(surrogates), figsize=(9, 2.2), layout="constrained")
    for ax, (advantage, surrogate) in zip(axes, surrogates.items()):
        color = GREEN if advantage > 0 else ORANGE
        ax.plot(ratio, ratio * advantage, color=GRAY, linestyle="--", label="ratio x A")
        ax.plot(ratio, surrogate, color=color, linewidth=2, label="clipped")
        ax.axvspan(low, high, color=BLUE, alpha=0.08, label=f"{low:g} to {high:g}")
        ax.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        ax.set(
            title=f"advantage A = {advantage:+.0f}",
            xlabel="ratio = p now / p when sampled",
            ylabel="gain of the token",
        )
        ax.legend()


def draw_curves(rows: list[dict], names: dict[str, str], window: int) -> None:
    """Draw metrics over the steps, as they are and as running means over `window` steps."""
    _, axes = plt.subplots(1, len(names), figsize=(9, 2.2), layout="constrained")
    steps = np.array([row["step"] for row in rows])
    for ax, (name, title) in zip(axes, names.items()):
        values = np.array([row[name] for row in rows], float)
        ax.plot(steps, values, color=GRAY, linewidth=0.8, label="each step")
        if len(values) > window:
            means = np.convolve(values, np.ones(window) / window, "valid")
            ax.plot(steps[window - 1 :], means, color=BLUE, linewidth=2, label=f"mean of {window}")
        ax.set(title=title, xlabel="optimizer step")
    axes[0].legend()


def draw_changes(scores: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw NDCG after minus before for each query, sorted, with the mean as a line.

    scores: {name of a set of queries: (before (Q,), after (Q,))}.
    """
    _, axes = plt.subplots(
        1, len(scores), figsize=(9, 2.4), sharey=True, layout="constrained", squeeze=False
    )
    for ax, (name, (before, after)) in zip(axes[0], scores.items()):
        change = np.sort(after - before)[::-1]
        mean_change = change.mean()
        colors = [GREEN if value > 0 else ORANGE for value in change]
        ax.bar(range(len(change)), change, width=1.0, color=colors)
        ax.axhline(mean_change, color=BLUE, linewidth=1.5, label=f"mean {mean_change:+.3f}")
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(
            title=f"{name}: NDCG {before.mean():.3f} -> {after.mean():.3f}",
            xlabel=f"{len(change)} queries, sorted by change",
            xticks=[],
        )
        ax.legend()
    axes[0, 0].set(ylabel="change of NDCG")
