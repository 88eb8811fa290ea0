"""The norm of the gradient of each layer, which says where a step moves the model.

Invariant: the squares of all of them add up to that of the step's gradient norm. They are added in
fp64 and have five digits, so that how ranks divide the parameters hardly shows.
"""

import re
from typing import TYPE_CHECKING

import torch

from forescale.models.parallel.whole import whole_of

if TYPE_CHECKING:
    from forescale.engine.step import Engine

_CHUNK = 1 << 22  # elements that are converted to fp64 at once


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its name up to the first number, such as layers.3; else the
    module that it is of, such as embedding."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name


@torch.no_grad()
def layer_norms(engine: "Engine") -> dict[str, float]:
    """Return the L2 norms of the averaged gradient, before clipping, by the layers' names in their
    order; frozen layers have none. All ranks call it together, between `backward` and the
    update."""
    world, layout = engine.world, engine.layout
    places = {name: i for i, name in enumerate(dict.fromkeys(map(layer_of, engine.shapes)))}
    both = torch.zeros(2, len(places), dtype=torch.float64, device=world.device)
    squares, elements = both
    if world.replicas.is_main:
        # Where ranks have the same elements, each adds its share, as in Replicated.square_sum.
        parts = layout.owned() if layout.replicated else layout.parts()
        for param, gradient in parts:
            alike = world.mesh.in_stage // whole_of(param).parts if layout.replicated else 1
            chunks = gradient.reshape(-1).split(_CHUNK)
            square = sum((chunk.double().square().sum() for chunk in chunks), torch.zeros(()))
            place = places[layer_of(engine.names[param])]
            squares[place] += square.to(world.device) / alike
            elements[place] += gradient.numel()
    squares, elements = world.sum(both).cpu()
    norms = squares.sqrt() / layout.loss_scale
    return {name: float(f"{norms[i].item():.5g}") for name, i in places.items() if elements[i]}
