"""The pictures of walkthrough.ipynb: each draws one figure from what the functions of recr1 have
returned. Nothing is computed here but places.
"""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np

from recr1.retrieval.bm25.searcher import BM25Searcher

INK = "#222222"
GREY = "#b8b8b8"
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
        "axes.edgecolor": GREY,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }
)


def tokens(pieces: list[tuple[str, list[str]]]) -> None:
    """A prompt's tokens as boxes, coloured by where they come from. pieces: [(origin, tokens), ...]
    in order.
    """
    colours = {origin: colour for (origin, _), colour in zip(pieces, (GREY, ORANGE, BLUE))}
    fig, ax = plt.subplots(figsize=(9, 0.9))
    x = 0.0
    for origin, texts in pieces:
        for text in texts:
            width = 0.8 + 0.42 * len(text)
            ax.add_patch(
                plt.Rectangle(
                    (x, 0),
                    width,
                    1,
                    facecolor=colours[origin],
                    alpha=0.35,
                    edgecolor="white",
                    linewidth=2,
                )
            )
            ax.text(
                x + width / 2,
                0.5,
                text.replace(" ", "·"),
                ha="center",
                va="center",
                family="monospace",
                fontsize=8,
                parse_math=False,
            )
            x += width
    ax.set(xlim=(0, x), ylim=(0, 1))
    ax.axis("off")
    ax.legend(
        handles=[
            plt.Rectangle((0, 0), 1, 1, color=c, alpha=0.35, label=origin)
            for origin, c in colours.items()
        ],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
    )


def texts(
    rows: list[list[str]],
    values: list[Sequence[float]],
    names: list[str],
    title: str,
    unit: str,
    diverging: bool = False,
) -> None:
    """Sampled texts, a row each, a box per token coloured by its value, whose name and unit stand
    at the scale: log-probs (0 is certain), or what pushes a token up or down.
    """
    numbers = np.concatenate([np.asarray(v, float) for v in values])
    edge = max(abs(numbers).max(), 1e-9)
    low, high, cmap = (
        (-edge, edge, plt.cm.PiYG)
        if diverging
        else (min(numbers.min(), -1.0), 0.0, plt.cm.YlOrBr_r)
    )
    fig, ax = plt.subplots(figsize=(9, 0.35 + 0.3 * len(rows)), layout="constrained")
    for y, (row, value) in enumerate(zip(rows, values)):
        x = 0.0
        for text, v in zip(row, value):
            width = 0.8 + 0.42 * len(text)
            shade = cmap(
                (v - low) / (high - low) * (1 if diverging else 0.9) + (0 if diverging else 0.1)
            )
            ax.add_patch(
                plt.Rectangle((x, y + 0.06), width, 0.88, facecolor=shade, edgecolor="none")
            )
            ax.text(
                x + width / 2,
                y + 0.5,
                text.replace(" ", "·"),
                ha="center",
                va="center",
                family="monospace",
                fontsize=8,
                parse_math=False,
                color="white" if np.dot(shade[:3], (0.3, 0.59, 0.11)) < 0.45 else INK,
            )
            x += width + 0.1
    longest = max(sum(0.9 + 0.42 * len(text) for text in row) for row in rows)
    ax.set(
        xlim=(0, longest),
        ylim=(len(rows), 0),
        yticks=np.arange(len(rows)) + 0.5,
        yticklabels=names,
        xticks=[],
        title=title,
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    fig.colorbar(
        plt.cm.ScalarMappable(plt.Normalize(low, high), cmap),
        ax=ax,
        fraction=0.02,
        pad=0.01,
        label=unit,
    )


def hits(
    retriever: BM25Searcher,
    queries: list[str],
    title: Callable[[str], str],
    gains: dict[str, float],
    k: int = 6,
) -> None:
    """The first k documents of each query: what each matched term adds to the score; judged
    documents in green. title: document id -> what is shown.
    """
    found = [[r for r in rows if r >= 0] for rows in retriever.search(queries, k)[0].tolist()]
    parts = [[retriever.explain(query, r) for r in rows] for query, rows in zip(queries, found)]
    terms = list(dict.fromkeys(term for ranked in parts for scores in ranked for term, _ in scores))
    palette = dict(zip(terms, plt.cm.tab20(np.arange(len(terms)) % 20)))
    fig, axes = plt.subplots(
        1,
        len(queries),
        figsize=(9, 0.9 + 0.28 * k),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    for ax, query, rows, ranked in zip(axes[0], queries, found, parts):
        for y, scores in enumerate(ranked):
            left = 0.0
            for term, part in scores:
                ax.barh(y, part, left=left, color=palette[term], edgecolor="white")
                left += part
        ax.set(
            title=short(query, 44),
            yticks=range(len(rows)),
            yticklabels=[short(title(retriever.doc_ids[r]), 30) for r in rows],
            xlabel="BM25 score, by term",
        )
        ax.title.set_parse_math(False)
        ax.invert_yaxis()
        for label, r in zip(ax.get_yticklabels(), rows):
            label.set(
                color=GREEN if gains.get(retriever.doc_ids[r], 0) > 0 else INK,
                weight="bold" if gains.get(retriever.doc_ids[r], 0) > 0 else "normal",
                parse_math=False,
            )
    fig.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=palette[t], label=t) for t in terms],
        loc="outside lower center",
        ncols=min(8, len(terms)),
    )


def short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 2] + ".."


def ranking(
    names: list[str],
    ranked: list[list[str]],
    gains: dict[str, float],
    values: list[float],
    metric: str,
    depth: int = 20,
) -> None:
    """Where the judged documents stand in each ranking, and what one is worth there to NDCG.
    values: of the whole rankings, by `metric`'s name.
    """
    fig, axes = plt.subplots(
        len(names),
        1,
        figsize=(9, 1.4 * len(names)),
        sharex=True,
        layout="constrained",
        squeeze=False,
    )
    worth = 1 / np.log2(np.arange(1, depth + 1) + 1)
    for ax, name, ids, value in zip(axes[:, 0], names, ranked, values):
        judged = [gains.get(id, 0) > 0 for id in ids[:depth]] + [False] * (depth - len(ids))
        ax.bar(range(1, depth + 1), worth, color=[GREEN if hit else "#e6e6e6" for hit in judged])
        ax.set(title=f"{name}      {metric} {value:.3f}", yticks=[0, 1], ylabel="1 / log2(i + 1)")
        ax.title.set_parse_math(False)
    axes[-1, 0].set(
        xlabel="rank i (green: a judged document stands there)", xticks=range(1, depth + 1)
    )


def advantages(rewards: Sequence[float], adv: Sequence[float], names: list[str]) -> None:
    """A group's rewards with their mean, and the advantages that come of them."""
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(9, 0.7 + 0.26 * len(names)), sharey=True, layout="constrained"
    )
    y = np.arange(len(names))
    left.barh(y, rewards, color=BLUE)
    left.axvline(np.mean(rewards), color=INK, linestyle=":", label=f"mean {np.mean(rewards):.3f}")
    left.legend(loc="lower left", bbox_to_anchor=(0.6, 1.0), borderaxespad=0)
    left.set(title="reward", yticks=y, yticklabels=names)
    right.barh(y, adv, color=[GREEN if a > 0 else ORANGE for a in adv])
    right.axvline(0, color=INK, linewidth=0.8)
    right.set(title="advantage: (reward - mean) / (std + floor)")
    right.tick_params(left=False)
    left.invert_yaxis()
    for label in left.get_yticklabels():
        label.set_parse_math(False)


def clip(ratio: np.ndarray, gains: dict[float, np.ndarray], low: float, high: float) -> None:
    """What a token adds to the objective, over the ratio of its probabilities, by the sign of its
    advantage.
    """
    fig, axes = plt.subplots(1, len(gains), figsize=(9, 2.2), layout="constrained")
    for ax, (adv, gain) in zip(axes, gains.items()):
        ax.plot(ratio, ratio * adv, color=GREY, linestyle="--", label="ratio x A")
        ax.plot(ratio, gain, color=GREEN if adv > 0 else ORANGE, linewidth=2, label="clipped")
        ax.axvspan(low, high, color=BLUE, alpha=0.08, label=f"{low:g} to {high:g}")
        ax.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        ax.set(
            title=f"advantage A = {adv:+.0f}",
            xlabel="ratio = p now / p when sampled",
            ylabel="gain of the token",
        )
        ax.legend()


def curves(rows: list[dict], names: dict[str, str], window: int) -> None:
    """Metrics over the steps, as they are and as running means over `window` steps."""
    fig, axes = plt.subplots(1, len(names), figsize=(9, 2.2), layout="constrained")
    steps = np.array([row["step"] for row in rows])
    for ax, (name, title) in zip(axes, names.items()):
        values = np.array([row[name] for row in rows], float)
        ax.plot(steps, values, color=GREY, linewidth=0.8, label="each step")
        if len(values) > window:
            ax.plot(
                steps[window - 1 :],
                np.convolve(values, np.ones(window) / window, "valid"),
                color=BLUE,
                linewidth=2,
                label=f"mean of {window}",
            )
        ax.set(title=title, xlabel="optimiser step")
    axes[0].legend()


def changes(parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Per query: NDCG after minus before, sorted; the mean of each part as a line. parts: {name:
    (before (Q,), after (Q,))}.
    """
    fig, axes = plt.subplots(
        1, len(parts), figsize=(9, 2.4), sharey=True, layout="constrained", squeeze=False
    )
    for ax, (name, (before, after)) in zip(axes[0], parts.items()):
        change = np.sort(after - before)[::-1]
        ax.bar(
            range(len(change)),
            change,
            width=1.0,
            color=[GREEN if c > 0 else ORANGE for c in change],
        )
        ax.axhline(change.mean(), color=BLUE, linewidth=1.5, label=f"mean {change.mean():+.3f}")
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(
            title=f"{name}: NDCG {before.mean():.3f} -> {after.mean():.3f}",
            xlabel=f"{len(change)} queries, sorted by change",
            xticks=[],
        )
        ax.legend()
    axes[0, 0].set(ylabel="change of NDCG")
