"""Sensitivity to vision: what is lost if the text of layers does not see the picture (VISOR paper, figure 4).

Tasks fall in two clusters by the share of their accuracy that they lose. A share, because a task that the model hardly
answers has few points to lose, however much it needs the picture.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import fcluster, linkage

from visor_jax.analysis import drawing
from visor_jax.analysis.base import LayerAnalysis, LayerTable, Measures, Row
from visor_jax.analysis.passes import Probe
from visor_jax.report import figures

CLUSTERS = ("robust", "sensitive")


def measure(probe: Probe) -> Measures:
    """Returns the columns of a batch."""
    layers = range(probe.num_layers)
    without = [probe.effect(dropped=[layer]) for layer in layers]
    from_on = [probe.effect(dropped=range(layer, probe.num_layers)) for layer in layers]
    whole = probe.effect().log_likelihood
    return {
        "accuracy_without": np.stack([effect.right for effect in without]),
        "accuracy_without_from": np.stack([effect.right for effect in from_on]),
        "loss_increase": np.stack([whole - effect.log_likelihood for effect in without]),
    }


def lost_shares(table: LayerTable) -> dict[str, Float[np.ndarray, " L"]]:
    """Returns the share of its accuracy that each task loses without vision from a layer on, if it has any."""
    without = table.measures["accuracy_without_from"]
    return {task: 1 - without[task] / accuracy for task, accuracy in table.accuracy.items() if accuracy > 0}


def clusters(table: LayerTable) -> dict[str, str]:
    """Divides the tasks in two by their lost shares of all layers (Ward); {} for fewer than three tasks.

    The cluster that loses more is the sensitive one. A task that is never answered is in neither.
    """
    shares = lost_shares(table)
    if len(shares) < 3:
        return {}
    values = np.stack(list(shares.values()))
    groups = fcluster(linkage(values, method="ward"), t=2, criterion="maxclust")
    means = {group: values[groups == group].mean() for group in set(groups.tolist())}
    most = max(means, key=means.__getitem__)
    return {name: CLUSTERS[int(group == most and len(means) > 1)] for name, group in zip(shares, groups, strict=True)}


def task_facts(table: LayerTable) -> dict[str, Row]:
    """Returns the cluster of each task."""
    found = clusters(table)
    return {task: {"cluster": found.get(task, "")} for task in table.samples}


@figures.styled
def draw(table: LayerTable) -> Figure:
    """Draws the share of accuracy lost if this and all later layers lose sight of the picture, tasks by layers."""
    shares, found = lost_shares(table), clusters(table)
    if not shares:
        return drawing.message("No question is answered right, so there is nothing to lose.")
    order = sorted(shares, key=lambda task: (found.get(task, "") == CLUSTERS[1], shares[task].mean()))
    values = 100 * np.stack([shares[task] for task in order])
    figure, axes = drawing.heat_map(
        values, [(task, table.levels[task]) for task in order], "right answers lost, %", most=100
    )
    axes.set_xlabel("first decoder layer without vision")
    first = sum(found.get(task, "") != CLUSTERS[1] for task in order)
    axes.set_title("What is lost without vision")
    if 0 < first < len(order):
        axes.axhline(first - 0.5, color=figures.INK, lw=3)
        axes.axhline(first - 0.5, color=figures.PAPER, lw=1.2)
        axes.set_title(f"{CLUSTERS[0]} above the line, {CLUSTERS[1]} below")
    return figure


ANALYSIS = LayerAnalysis(
    name="vision_drop",
    columns={
        "accuracy_without": "accuracy if the layer's text sees no picture",
        "accuracy_without_from": "accuracy if the text of this and all later layers sees no picture",
        "loss_increase": "rise of the answer's loss per token if the layer's text sees no picture, nats",
    },
    measure=measure,
    draw=draw,
    task_facts=task_facts,
)
