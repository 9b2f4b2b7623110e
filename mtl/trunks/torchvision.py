"""Trunks from torchvision, by name."""

import torch
from torch import Tensor, nn

from mtl.errors import UserError, suggest
from mtl.trunks.weights import load_weights

AUXILIARY = ("googlenet", "inception_v3")  # they have classifiers on the way too, whose outputs would go nowhere
SIZE = 224  # of the image that is sent through to see the features' shape


class Torchvision(nn.Module):
    """A classifier of torchvision's without its last linear layer: (N, 3, H, W) images to features.

    Images of one channel are taken for grey ones.

    Args:
        name: torchvision's, such as resnet18.
        weights: a file with the state dict of the model of that name; the last layer's are left out. None begins with
            random ones; nothing is downloaded.
        features: a node of the model, such as layer3. None: what the last layer is given; or, where they aren't to be
            pooled, the last maps (N, C, h, w) or tokens (N, T, C) before that.
        pooled: whether maps and tokens are averaged over their positions, to (N, C).

    Raises:
        UserError: for a name, a file or a node that there isn't, and for weights that don't fit.
    """

    def __init__(
        self, name: str, *, weights: str | None = None, features: str | None = None, pooled: bool = True
    ) -> None:
        super().__init__()
        from torchvision import models  # takes seconds

        everything = models.list_models(module=models)  # type: ignore[attr-defined]
        known = [model for model in everything if model not in AUXILIARY]
        if name not in known:
            raise UserError(f"model.trunk.name: torchvision has no '{name}'" + suggest(name, known))
        model = models.get_model(name, weights=None)  # type: ignore[attr-defined]
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        last = linear[-1] if linear else None
        if last is not None:
            self.num_features = model.get_submodule(last).in_features
            model.set_submodule(last, nn.Identity())
        elif features is None:
            raise UserError(f"model.trunk.features: {name} has no linear layer at its end; name a node of it")
        if weights is not None:
            load_weights(model, weights, name, without=last)
        self.pooled = pooled
        self.node = features
        if features is None and not pooled:
            self.node = _last_maps(model)
        self.model = model if self.node is None else _up_to(model, self.node, name)
        if self.node is not None:
            with torch.no_grad():
                given = self.model.eval()(torch.zeros(1, 3, SIZE, SIZE))[self.node]
            self.num_features = given.shape[2 if given.ndim == 3 else 1]
            self.model.train()

    def forward(self, image: Tensor) -> Tensor:
        """Features of shape (N, num_features), or maps or tokens of that width."""
        given = self.model(image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image)
        features: Tensor = given if self.node is None else given[self.node]
        if not self.pooled or features.ndim == 2:
            return features
        return features.mean(1) if features.ndim == 3 else features.mean((2, 3))


def _last_maps(model: nn.Module) -> str:
    """The node that gives the last maps or tokens of more than one position."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    train, evaluation = get_graph_node_names(model, suppress_diff_warning=True)
    extractor = create_feature_extractor(
        model,
        train_return_nodes={node: node for node in train[-1:]},
        eval_return_nodes={node: node for node in evaluation},
        suppress_diff_warning=True,
    )
    with torch.no_grad():
        given = extractor.eval()(torch.zeros(1, 3, SIZE, SIZE))
    fixed = {path for path, module in model.named_modules() if isinstance(module, nn.AdaptiveAvgPool2d)}
    return [
        node
        for node in evaluation
        if isinstance(value := given[node], Tensor)
        and (value.ndim == 3 or (value.ndim == 4 and min(value.shape[2:]) > 1))
        and node not in fixed
    ][-1]


def _up_to(model: nn.Module, node: str, name: str) -> nn.Module:
    """The model up to the node, as a module that gives a dict with it."""
    from torchvision.models.feature_extraction import create_feature_extractor

    try:
        return create_feature_extractor(model, [node], suppress_diff_warning=True)
    except ValueError:
        parts = [part for part, _ in model.named_children()]
        raise UserError(
            f"model.trunk.features: {name} has no node '{node}'{suggest(node, parts)}, or a part of one of these, such "
            "as layer3.0 of resnet18"
        ) from None
