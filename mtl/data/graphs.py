"""Batches of graphs, as the layers of PyTorch Geometric take them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from mtl.errors import UserError


def collate_graphs(samples: Sequence[Mapping[str, Any]], *, edges: Sequence[str] = ("edge_attr",)) -> dict[str, Any]:
    """Joins graphs into one large graph without edges between them; for `data.collate`.

    A sample has the fields `x` (nodes, features) and `edge_index` (2, edges), whose node numbers begin at 0 in each
    graph. In the batch, the nodes and edges of all graphs follow each other, the node numbers continue from graph to
    graph, and the additional field `batch` (nodes,) has the number of each node's graph. All other fields belong to
    the whole graph, such as a target, and are stacked.

    Since the loader collates each micro-batch separately, each has whole graphs only. A batch of graphs that was
    already collated can't be divided.

    Args:
        samples: The graphs.
        edges: The fields of the edges besides `edge_index`, with the edge as first dimension.

    Raises:
        UserError: If a sample lacks a field.
    """
    flat = ("x", "edge_index", *edges)
    for name in flat:
        if any(name not in sample for sample in samples):
            raise UserError(f"a graph has no field '{name}'; its fields are: {', '.join(samples[0])}")
    sizes = torch.tensor([len(sample["x"]) for sample in samples])
    starts = (sizes.cumsum(0) - sizes).tolist()
    of_graphs = [{name: value for name, value in sample.items() if name not in flat} for sample in samples]
    joined: dict[str, Tensor] = {name: torch.cat([sample[name] for sample in samples]) for name in ("x", *edges)}
    numbers = [sample["edge_index"] + start for sample, start in zip(samples, starts, strict=True)]
    whole: dict[str, Any] = default_collate(of_graphs)
    return {
        **joined,
        "edge_index": torch.cat(numbers, 1),
        "batch": torch.arange(len(samples)).repeat_interleave(sizes),
        **whole,
    }
