"""Draw the pictures of walkthrough.ipynb.

Each function draws one figure from what the functions of recr1 have returned. Nothing is computed
here but places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

from recr1.retrieval.bm25.searcher import BM25Searcher

INK = "#222222"
GRAY = "#b8b8b8"
LIGHT_GRAY = "#e6e6e6"
BLUE = "#3b6fb6"
ORANGE = "#d9822b"
GREEN = "#3f9b5b"
ORIGIN_COLORS = (GRAY, ORANGE, BLUE)
LUMINANCE = (0.3, 0.59, 0.11)  # of red, green and blue
STYLE = {
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
plt.rcParams.update(STYLE)


def draw_tokens(pieces: list[tuple[str, list[str]]]) -> None:
    """Draw a prompt's tokens as boxes, colored by where they come from.

    pieces: [(origin, tokens), ...] in order.
    """
    origins = [origin for origin, _ in pieces]
    colors = dict(zip(origins, ORIGIN_COLORS))
    _, ax = plt.subplots(figsize=(9, 0.9))
    x = 0.0
    for origin, texts in pieces:
        color = colors[origin]
        for text in texts:
            width = _measure_box(text)
            box = plt.Rectangle((x, 0), width, 1, facecolor=color, alpha=0.35)
            box.set(edgecolor="white", linewidth=2)
            ax.add_patch(box)
            center = x + width / 2
            _write_token(ax, center, 0.5, text)
            x += width
    ax.set(xlim=(0, x), ylim=(0, 1))
    ax.axis("off")
    handles = []
    for origin, color in colors.items():
        handle = plt.Rectangle((0, 0), 1, 1, color=color, alpha=0.35, label=origin)
        handles.append(handle)
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
    arrays = [np.asarray(row_values, float) for row_values in values]
    all_values = np.concatenate(arrays)
    low, high, colormap = _choose_scale(all_values, diverging)
    height = 0.35 + 0.3 * len(rows)
    fig, ax = plt.subplots(figsize=(9, height), layout="constrained")
    longest_row = 0.0
    for y, (texts, row_values) in enumerate(zip(rows, values)):
        x = 0.0
        for text, value in zip(texts, row_values):
            position = (value - low) / (high - low)  # on the scale, 0 to 1
            if not diverging:
                position = position * 0.9 + 0.1  # the darkest tenth hides the text
            shade = colormap(position)
            x += _draw_box(ax, x, y, text, shade) + 0.1
        longest_row = max(longest_row, x)
    ax.set(xlim=(0, longest_row), ylim=(len(rows), 0), title=title)
    middles = np.arange(len(rows)) + 0.5
    ax.set(xticks=[], yticks=middles, yticklabels=names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    limits = plt.Normalize(low, high)
    scale = plt.cm.ScalarMappable(limits, colormap)
    fig.colorbar(scale, ax=ax, fraction=0.02, pad=0.01, label=unit)


def _choose_scale(values: np.ndarray, diverging: bool) -> tuple[float, float, Colormap]:
    """Return the lowest value, the highest value and the colors between them."""
    if not diverging:
        low = min(values.min(), -1.0)
        return low, 0.0, plt.cm.YlOrBr_r
    high = max(abs(values).max(), 1e-9)
    return -high, high, plt.cm.PiYG


def _draw_box(ax: Axes, x: float, y: int, text: str, shade: tuple[float, ...]) -> float:
    """Draw a token's box in row y, from x on, and return its width."""
    width = _measure_box(text)
    box = plt.Rectangle((x, y + 0.06), width, 0.88, facecolor=shade, edgecolor="none")
    ax.add_patch(box)
    luminance = np.dot(shade[:3], LUMINANCE)
    color = "white" if luminance < 0.45 else INK
    center = x + width / 2
    _write_token(ax, center, y + 0.5, text, color=color)
    return width


def _measure_box(text: str) -> float:
    """Return the width of a token's box."""
    return 0.8 + 0.42 * len(text)


def _write_token(ax: Axes, x: float, y: float, text: str, **style) -> None:
    """Write a token into its box; a dot stands for a space."""
    shown = text.replace(" ", "·")
    label = ax.text(x, y, shown, ha="center", va="center", **style)
    label.set(family="monospace", fontsize=8, parse_math=False)


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
    hits, _ = retriever.search(queries, k)
    found_rows = []  # of each query: its hits, as rows of the retriever
    term_scores = []  # of each hit: [(term, score), ...]
    for query, query_hits in zip(queries, hits.tolist()):
        rows = [row for row in query_hits if row >= 0]
        found_rows.append(rows)
        query_scores = [retriever.explain(query, row) for row in rows]
        term_scores.append(query_scores)
    palette = _choose_term_colors(term_scores)

    size = (9, 0.9 + 0.28 * k)
    fig, axes = plt.subplots(
        1, len(queries), figsize=size, sharex=True, layout="constrained", squeeze=False
    )
    for ax, query, rows, query_scores in zip(axes[0], queries, found_rows, term_scores):
        _draw_term_scores(ax, query_scores, palette)
        doc_ids = [retriever.doc_ids[row] for row in rows]
        _label_documents(ax, doc_ids, title, gains)
        short_query = _shorten(query, 44)
        ax.set(title=short_query, xlabel="BM25 score, by term")
        ax.title.set_parse_math(False)
        ax.invert_yaxis()
    handles = []
    for term, color in palette.items():
        handle = plt.Rectangle((0, 0), 1, 1, color=color, label=term)
        handles.append(handle)
    num_columns = min(8, len(palette))
    fig.legend(handles=handles, loc="outside lower center", ncols=num_columns)


def _choose_term_colors(term_scores: list[list[list[tuple[str, float]]]]) -> dict[str, np.ndarray]:
    """Return {term: its color}, in the order of their first use.

    term_scores: of each query, of each of its hits: [(term, score), ...].
    """
    terms: list[str] = []
    for query_scores in term_scores:
        for document_scores in query_scores:
            for term, _ in document_scores:
                if term not in terms:
                    terms.append(term)
    numbers = np.arange(len(terms)) % 20
    colors = plt.cm.tab20(numbers)
    return dict(zip(terms, colors))


def _draw_term_scores(
    ax: Axes, query_scores: list[list[tuple[str, float]]], palette: dict[str, np.ndarray]
) -> None:
    """Draw a bar for each hit of a query, a piece of it for each matched term."""
    for y, document_scores in enumerate(query_scores):
        left = 0.0
        for term, score in document_scores:
            ax.barh(y, score, left=left, color=palette[term], edgecolor="white")
            left += score


def _label_documents(
    ax: Axes, doc_ids: list[str], title: Callable[[str], str], gains: dict[str, float]
) -> None:
    """Write the documents' titles beside their bars, those of judged documents in green."""
    titles = []
    for doc_id in doc_ids:
        short_title = _shorten(title(doc_id), 30)
        titles.append(short_title)
    ax.set(yticks=range(len(doc_ids)), yticklabels=titles)
    for label, doc_id in zip(ax.get_yticklabels(), doc_ids):
        label.set(color=INK, weight="normal", parse_math=False)
        if gains.get(doc_id, 0) > 0:
            label.set(color=GREEN, weight="bold")


def _shorten(text: str, max_chars: int) -> str:
    """Cut a text at `max_chars`."""
    if len(text) <= max_chars:
        return text
    return text[: max_chars - 2] + ".."


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
    size = (9, 1.4 * len(names))
    _, axes = plt.subplots(
        len(names), 1, figsize=size, sharex=True, layout="constrained", squeeze=False
    )
    ranks = np.arange(1, depth + 1)
    discounts = 1 / np.log2(ranks + 1)
    for ax, name, ids, value in zip(axes[:, 0], names, rankings, values):
        colors = [LIGHT_GRAY] * depth
        for index, id in enumerate(ids[:depth]):
            if gains.get(id, 0) > 0:
                colors[index] = GREEN
        ax.bar(ranks, discounts, color=colors)
        title = f"{name}      {metric} {value:.3f}"
        ax.set(title=title, yticks=[0, 1], ylabel="1 / log2(i + 1)")
        ax.title.set_parse_math(False)
    lowest = axes[-1, 0]
    lowest.set(xlabel="rank i (green: a judged document stands there)", xticks=ranks)


def draw_advantages(
    rewards: Sequence[float], advantages: Sequence[float], names: list[str]
) -> None:
    """Draw a group's rewards with their mean, and the advantages that come of them."""
    size = (9, 0.7 + 0.26 * len(names))
    _, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    y = np.arange(len(names))
    mean_reward = np.mean(rewards)
    left.barh(y, rewards, color=BLUE)
    left.axvline(mean_reward, color=INK, linestyle=":", label=f"mean {mean_reward:.3f}")
    left.legend(loc="lower left", bbox_to_anchor=(0.6, 1.0), borderaxespad=0)
    left.set(title="reward", yticks=y, yticklabels=names)
    colors = _color_signs(advantages)
    right.barh(y, advantages, color=colors)
    right.axvline(0, color=INK, linewidth=0.8)
    right.set(title="advantage: (reward - mean) / (std + floor)")
    right.tick_params(left=False)
    left.invert_yaxis()
    for label in left.get_yticklabels():
        label.set_parse_math(False)


def _color_signs(values: Iterable[float]) -> list[str]:
    """Return green for each value above 0 and orange for the others."""
    return [GREEN if value > 0 else ORANGE for value in values]


def draw_clip(
    ratio: np.ndarray, surrogates: dict[float, np.ndarray], low: float, high: float
) -> None:
    """Draw what a token adds to the objective, over the ratio of its probabilities.

    surrogates: {advantage: (n,)}, at the ratios `ratio` (n,); low, high: the limits of the clip.
    """
    _, axes = plt.subplots(1, len(surrogates), figsize=(9, 2.2), layout="constrained")
    for ax, (advantage, surrogate) in zip(axes, surrogates.items()):
        [color] = _color_signs([advantage])
        unclipped = ratio * advantage
        ax.plot(ratio, unclipped, color=GRAY, linestyle="--", label="ratio x A")
        ax.plot(ratio, surrogate, color=color, linewidth=2, label="clipped")
        ax.axvspan(low, high, color=BLUE, alpha=0.08, label=f"{low:g} to {high:g}")
        ax.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        ax.set(title=f"advantage A = {advantage:+.0f}")
        ax.set(xlabel="ratio = p now / p when sampled", ylabel="gain of the token")
        ax.legend()


def draw_curves(rows: list[dict], names: dict[str, str], window: int) -> None:
    """Draw metrics over the steps, as they are and as running means over `window` steps."""
    _, axes = plt.subplots(1, len(names), figsize=(9, 2.2), layout="constrained")
    steps = np.array([row["step"] for row in rows])
    for ax, (name, title) in zip(axes, names.items()):
        values = np.array([row[name] for row in rows], float)
        ax.plot(steps, values, color=GRAY, linewidth=0.8, label="each step")
        if len(values) > window:
            weights = np.ones(window) / window
            means = np.convolve(values, weights, "valid")
            full_steps = steps[window - 1 :]
            ax.plot(full_steps, means, color=BLUE, linewidth=2, label=f"mean of {window}")
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
        colors = _color_signs(change)
        ax.bar(range(len(change)), change, width=1.0, color=colors)
        ax.axhline(mean_change, color=BLUE, linewidth=1.5, label=f"mean {mean_change:+.3f}")
        ax.axhline(0, color=INK, linewidth=0.8)
        mean_before = before.mean()
        mean_after = after.mean()
        ax.set(title=f"{name}: NDCG {mean_before:.3f} -> {mean_after:.3f}")
        ax.set(xlabel=f"{len(change)} queries, sorted by change", xticks=[])
        ax.legend()
    axes[0, 0].set(ylabel="change of NDCG")
