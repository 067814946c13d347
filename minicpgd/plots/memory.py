"""Where the memory goes: one pair of bars for each model.

In: predictions by name, usually a model's. Out: a matplotlib `Figure`.
"""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minicpgd.memory.predict import GIB, ROLLOUT, UPDATE, Memory
from minicpgd.plots.style import COLOURS, styled

PARTS = {  # Each part of a bar has components, and a hatch for prints in grey.
    "weights": (("weights", "reference"), ""),
    "what is trained, its gradients and moments": (("adapter", "gradients", "optimizer"), "////"),
    "KV cache": (("KV cache",), "...."),
    "activations": (("activations",), "xxxx"),
    "logits": (("logits",), "----"),
    "one layer at work": (("one layer", "dequantised"), "\\\\\\\\"),
}


@styled
def memory_bars(predicted: Mapping[str, Memory], cards: Mapping[str, float] = {}) -> Figure:  # noqa: B006 (not changed)
    """The largest moment of the rollout and of the update, by component; `cards` has the size of each card in GiB."""
    figure = Figure(figsize=(10, 1.5 + 0.9 * len(predicted)), layout="constrained")
    axis = figure.subplots()
    places, labels, parts = [], [], list(zip(PARTS.items(), COLOURS, strict=False))
    for i, (name, memory) in enumerate(predicted.items()):
        for phase, moments, place in (("rollout", ROLLOUT, 2.5 * i), ("update", UPDATE, 2.5 * i + 0.9)):
            bytes_of, left = memory.moments[max(moments, key=memory.total)], 0.0
            for (_, (components, hatch)), colour in parts:
                width = sum(bytes_of[component] for component in components) / GIB
                axis.barh(place, width, 0.8, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
                left += width
            axis.barh(place, memory.assumed / GIB, 0.8, left, color="white", edgecolor="#777777", linewidth=0.8)
            end = left + memory.assumed / GIB
            axis.annotate(f"{end:.1f}", (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
            if name in cards:
                axis.plot([cards[name]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2.5)
            places.append(place)
            labels.append(f"{name.split('/')[-1]}   {phase}" if phase == "rollout" else phase)
        if name in cards:
            axis.annotate(f"{cards[name]:g} GB card", (cards[name], 2.5 * i + 0.45), (-6, 0), ha="right", va="center",
                          textcoords="offset points", fontsize=9, fontweight="bold")  # fmt: skip
    axis.set_yticks(places, labels)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.invert_yaxis()
    axis.set_xlabel("GiB at the phase's largest moment")
    handles = [Patch(facecolor=c, hatch=hatch, edgecolor="white", label=part) for (part, (_, hatch)), c in parts]
    handles.append(Patch(facecolor="white", edgecolor="#777777", label="assumed: CUDA itself, allocator"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9)
    return figure
