"""The figures of a report: charts as SVG, each with the numbers that it shows, and overlays as PNG."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

# the first six are of Okabe and Ito's colours, which colour-blind people can tell apart; the baseline has the first
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7F7F7F")
REFERENCE_COLOR = "#FFFFFF"
_TEXT = "#010203"  # takes the place of the page's text colour
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may contain dollar signs
    "svg.hashsalt": "nnunet_semiseg",  # so that the same figure gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{name}": _TEXT for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
}


@dataclass(frozen=True)
class Chart:
    """A figure and its numbers.

    Attributes:
        svg: the `<svg>` element of the figure, see `to_svg`.
        data: the numbers of the figure's points, one row for each point.
    """

    svg: str
    data: pd.DataFrame


def color_of(methods: Sequence[str]) -> dict[str, str]:
    """The colour of each method, by its place in the list. From the ninth method on the colours repeat."""
    return {method: COLORS[i % len(COLORS)] for i, method in enumerate(methods)}


def to_svg(figure: Figure, name: str) -> str:
    """Turn a figure into an `<svg>` element. Its text has the colour of the page's text (`currentColor`).

    Args:
        name: a prefix for every id in the element. Each figure of a page needs its own.
    """
    file = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().replace(_TEXT, "currentColor")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}_", text)
    return re.sub(r"(?s)^.*?<svg ", "<svg ", text)


def box_plots(scores: pd.DataFrame, metric: str, heading: str, name: str) -> Chart:
    """Draw a panel for each label, and in it a box for each method. A dot is the mean of a case over all runs.

    Args:
        scores: columns `method`, `label`, `case` and `metric`, with one row for each run.
        heading: the title of the axis.
        name: see `to_svg`.
    """
    scores = scores.groupby(["method", "label", "case"], sort=False)[metric].mean().reset_index()
    methods, labels = list(scores["method"].unique()), list(scores["label"].unique())
    colors = color_of(methods)
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 0.9 + len(labels) * (0.55 + 0.36 * len(methods))), layout="constrained")
        axes = figure.subplots(len(labels), 1, squeeze=False, sharex=True)[:, 0]
        for ax, label in zip(axes, labels, strict=True):
            of_label = scores[scores["label"] == label]
            values = [of_label[of_label["method"] == m][metric].dropna().to_numpy() for m in methods]
            boxes = ax.boxplot(
                values, orientation="horizontal", tick_labels=methods, widths=0.6, showfliers=False, patch_artist=True,
                medianprops={"color": _TEXT}, whiskerprops={"color": _TEXT}, capprops={"color": _TEXT},
                boxprops={"edgecolor": _TEXT},
            )  # fmt: skip
            for i, (method, box, points) in enumerate(zip(methods, boxes["boxes"], values, strict=True)):
                box.set(facecolor=colors[method], alpha=0.55)
                spread = np.linspace(-0.18, 0.18, len(points)) if len(points) > 1 else np.zeros(len(points))
                ax.plot(points, np.add(i + 1, spread), ".", color=colors[method], markersize=5, clip_on=False)
            ax.invert_yaxis()
            ax.grid(axis="x", color=_TEXT, alpha=0.15)
            ax.set_title(label if len(labels) > 1 else "", loc="left", fontsize=10)
        axes[-1].set_xlabel(heading)
    return Chart(to_svg(figure, name), scores)


def curves(
    points: pd.DataFrame, xlabel: str, ylabel: str, name: str, line_at: tuple[str, float] | None = None
) -> Chart:
    """Draw a line of means with error bars for each method, against values such as the number of labelled cases.

    Args:
        points: columns `method`, `x`, `mean` and `over_runs` (a standard deviation; nan if there is one run). A row
            whose `x` is not a number is not plotted.
        name: see `to_svg`.
        line_at: a name and a value, plotted as a horizontal line.
    """
    numbers = points.assign(x=pd.to_numeric(points["x"], errors="coerce")).dropna(subset="x").sort_values("x")
    lines = {m: (of["x"], of["mean"], of["over_runs"]) for m, of in numbers.groupby("method", sort=False)}
    colors = color_of(list(lines))
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        ax = figure.subplots()
        for method, (x, mean, spread) in lines.items():
            ax.errorbar(x, mean, np.nan_to_num(spread), color=colors[method], label=method, marker="o", capsize=3)
        if line_at:
            ax.axhline(line_at[1], color=_TEXT, linestyle="--", linewidth=1, label=line_at[0])
        ax.set(xlabel=xlabel, ylabel=ylabel)
        ax.set_xticks(sorted({value for x, *_ in lines.values() for value in x}))
        ax.grid(color=_TEXT, alpha=0.15)
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18))
    return Chart(to_svg(figure, name), points)


def training_curves(logs: Mapping[str, Mapping[str, Sequence[float]]], prefix: str, name: str) -> Chart:
    """Draw what each run logged: the losses, all their terms, and the pseudo Dice on the validation patches.

    Args:
        logs: for each run nnU-Net's log, with one value for each epoch.
        prefix: the beginning of the keys of loss terms.
        name: see `to_svg`.
    """
    data = []
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 2.1 * len(logs) + 0.3), layout="constrained")
        axes = figure.subplots(len(logs), 2, squeeze=False)
        for (left, right), (run, log) in zip(axes, logs.items(), strict=True):
            terms = {"training": log["train_losses"], "validation": log["val_losses"]}
            terms |= {key.removeprefix(prefix): value for key, value in log.items() if key.startswith(prefix)}
            marker = "." if len(log["train_losses"]) == 1 else ""  # a line of one point cannot be seen
            for i, (term, values) in enumerate(terms.items()):
                style = "-" if term in ("training", "validation") else "--"
                left.plot(values, marker + style, color=COLORS[i % len(COLORS)], label=term, linewidth=1.2)
            right.plot(log["mean_fg_dice"], marker + "-", color=COLORS[0], linewidth=0.8, alpha=0.5)
            right.plot(log["ema_fg_dice"], marker + "-", color=COLORS[0], linewidth=1.4)
            left.set_title(run, loc="left", fontsize=9)
            left.legend(frameon=False, fontsize=7, ncols=2)
            right.set_title("pseudo Dice on validation patches", loc="left", fontsize=9)
            for ax in (left, right):
                ax.grid(color=_TEXT, alpha=0.15)
                ax.tick_params(labelsize=8)
            logged = {f"loss, {term}": values for term, values in terms.items()}
            logged |= {"pseudo Dice": log["mean_fg_dice"], "pseudo Dice, moving average": log["ema_fg_dice"]}
            data += [(run, epoch, what, value) for what, of in logged.items() for epoch, value in enumerate(of)]
        axes[-1][0].set_xlabel("epoch")
        axes[-1][1].set_xlabel("epoch")
    return Chart(to_svg(figure, name), pd.DataFrame(data, columns=["run", "epoch", "curve", "value"]))


def overlay(
    image: np.ndarray,
    reference: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    labels: Sequence,
    aspect: float,
    colors: Mapping[str, str] | None = None,
) -> str:
    """Draw contours on a slice: white for the reference, a colour for each method. Returns a data URI.

    Args:
        image: (H, W) intensities.
        reference, predictions: (H, W) label maps.
        labels: the value of each class; for a region a list of values.
        aspect: height of a pixel divided by its width.
        colors: the colours of the predictions. None: `color_of`.
    """
    colors = colors or color_of(list(predictions))
    low, high = np.percentile(image, (1, 99))
    height = 3.2 * aspect * image.shape[0] / image.shape[1]
    figure = Figure(figsize=(3.2, min(6.4, max(1.2, height))))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest")
    for name, labelled in (("", reference), *predictions.items()):
        color, width = (colors[name], 1.3) if name else (REFERENCE_COLOR, 2.2)
        for label in labels:
            mask = np.isin(labelled, label)
            if mask.any() and not mask.all():
                ax.contour(mask, [0.5], colors=[color], linewidths=width)
    ax.axis("off")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
