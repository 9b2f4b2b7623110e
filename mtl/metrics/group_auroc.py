"""The area under the ROC curve within groups, such as the impressions of a user."""

import torch
from torch import Tensor
from torchmetrics import Metric


class GroupAUROC(Metric):
    """The mean of the groups' AUC, weighted by their numbers of samples (GAUC).

    Groups with one class only have no AUC and are left out; without any other group, the value is NaN. Equal scores
    count half. The weighting is that of DIN (Zhou et al., KDD 2018, arXiv 1706.06978).

    Args:
        group: The field of the batch with the group of each sample, integers (N,), such as the ids of users.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    scores: list[Tensor]
    targets: list[Tensor]
    groups: list[Tensor]

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        for name in ("scores", "targets", "groups"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, prediction: Tensor, target: Tensor, group: Tensor) -> None:
        """Adds samples: scores, labels of 0 and 1, and groups, (N,) each."""
        self.scores.append(prediction.detach())
        self.targets.append(target)
        self.groups.append(group)

    def compute(self) -> Tensor:
        """Computes the metric from all samples."""
        scores, targets, groups = (
            torch.cat(state) if isinstance(state, list) else state for state in (self.scores, self.targets, self.groups)
        )
        order = scores.argsort()
        order = order[groups[order].argsort(stable=True)]  # by group, then by score
        scores, positive, groups = scores[order], targets[order] > 0.5, groups[order]
        _, group, size = torch.unique(groups, return_inverse=True, return_counts=True)
        start = size.cumsum(0) - size
        rank = torch.arange(1, len(group) + 1, device=group.device) - start[group]
        new = torch.ones_like(positive)
        new[1:] = (group[1:] != group[:-1]) | (scores[1:] != scores[:-1])
        tied = new.cumsum(0) - 1  # the number of the run of equal scores
        mean_rank = _sums(rank, tied) / _sums(torch.ones_like(rank), tied)
        positives = _sums(positive, group)
        negatives = size - positives
        won = _sums(mean_rank[tied] * positive, group) - positives * (positives + 1) / 2
        both = (positives > 0) & (negatives > 0)
        auc = (won / (positives * negatives))[both]
        mean: Tensor = (auc * size[both]).sum() / size[both].sum()
        return mean


def _sums(values: Tensor, index: Tensor) -> Tensor:
    """Returns the sums of the values with equal indices, which are sorted and have no gaps: float64."""
    return torch.zeros(int(index[-1]) + 1, dtype=torch.float64, device=values.device).index_add_(
        0, index, values.double()
    )
