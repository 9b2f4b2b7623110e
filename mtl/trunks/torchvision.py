"""Trunks from torchvision, by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtl.errors import UserError, first_line, suggest
from mtl.trunks.sequence import channels_first, in_colours, sequence
from mtl.trunks.stages import averaged
from mtl.trunks.weights import load_weights

AUXILIARY = ("googlenet", "inception_v3")  # excluded: the outputs of their auxiliary classifiers would be unused
SIZE = 224  # the size of the image with which the features' shape is determined


class Torchvision(nn.Module):
    """A classifier of torchvision's without its last linear layer: (N, 3, H, W) images to features.

    Images with one channel are treated as grey.

    Args:
        name: The name of a model in torchvision, such as resnet18.
        weights: A file with the state dict of the model, of which the last layer isn't used. None stands for random
            initial values; nothing is downloaded.
        features: The node of the model whose output is the features, such as layer3. None stands for the input of the
            last layer or, without pooling, for the last maps (N, C, h, w) or tokens (N, T, C) before it.
        pooled: Whether maps and tokens are averaged over their positions, to (N, C).
        options: Further arguments of torchvision's model, such as `replace_stride_with_dilation` or `image_size`.

    Raises:
        UserError: If the model, the file or the node doesn't exist, if the model doesn't have such an option, or if the
            weights don't fit the model.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | None = None,
        features: str | None = None,
        pooled: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        from torchvision import models  # takes seconds

        everything = models.list_models(module=models)  # type: ignore[attr-defined]
        known = [model for model in everything if model not in AUXILIARY]
        if name not in known:
            raise UserError(f"model.trunk.name: torchvision has no '{name}'" + suggest(name, known))
        model = _with_options(name, options)
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        last = linear[-1] if linear else None
        if last is not None:
            self.num_features = model.get_submodule(last).in_features
            model.set_submodule(last, nn.Identity())
        elif features is None:
            raise UserError(f"model.trunk.features: {name} has no linear layer at its end; name a node of it")
        if weights is not None:
            load_weights(model, weights, name, without=last)
        size = options.get("image_size", SIZE)
        self.pooled = pooled
        self._whole = (model,)  # in a tuple, since parameters behind the features aren't parameters of the trunk
        self.node = features
        if features is None and not pooled:
            self.node = _last_maps(model, size)
        # The maps of a Swin transformer are (N, h, w, C), but for the first convolution and what follows its blocks.
        first = (None, "features.0.0", "permute", "avgpool")
        self._channels_last = type(model).__name__ == "SwinTransformer" and self.node not in first
        self.model = model if self.node is None else _up_to(model, self.node, name)
        if self.node is not None:
            with torch.no_grad():
                output: Any = self.eval()._output(torch.zeros(1, 3, size, size))
            self.num_features = output.shape[2 if output.ndim == 3 else 1]
            self.train()

    def forward(self, image: Tensor) -> Tensor:
        """Computes features (N, num_features), or maps or tokens with this number of channels."""
        features = self._output(image)
        return averaged(features) if self.pooled else features

    def _output(self, image: Tensor) -> Tensor:
        """Returns the output of the model or its node; maps have their channels first."""
        output = self.model(in_colours(image))
        features: Tensor = output if self.node is None else output[self.node]
        return channels_first(features) if self._channels_last and features.ndim == 4 else features

    def stages(self) -> list[nn.Module]:
        """Returns the trunk's stages, see `mtl.trunks.stages`: each ends after a block of layers or a pooling.

        Raises:
            UserError: If the model isn't a sequence of its parts, as a vision transformer.
        """
        return sequence(self, self._whole[0])


def _with_options(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Returns torchvision's model with random initial values.

    Raises:
        UserError: If the model doesn't have one of the options, or refuses its value.
    """
    from torchvision import models

    try:
        model: nn.Module = models.get_model(name, weights=None, **options)  # type: ignore[attr-defined]
    except (TypeError, ValueError, NotImplementedError) as error:
        if not options:
            raise
        own = ("weights", "features", "pooled")
        near = "".join(suggest(key, own).split(" (possible")[0] for key in options)
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(
            f"model.trunk: torchvision's {name} can't be built with {given}: "
            f"{first_line(error)}{near}. Keys of mtl.trunks.Torchvision itself are name, {', '.join(own)}; all others "
            "are passed on to torchvision"
        ) from error
    return model


def _last_maps(model: nn.Module, size: int) -> str:
    """Returns the last node whose output is maps or tokens with more than one position."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    train, evaluation = get_graph_node_names(model, suppress_diff_warning=True)
    extractor = create_feature_extractor(
        model,
        train_return_nodes={node: node for node in train[-1:]},
        eval_return_nodes={node: node for node in evaluation},
        suppress_diff_warning=True,
    )
    with torch.no_grad():
        outputs = extractor.eval()(torch.zeros(1, 3, size, size))
    fixed = {path for path, module in model.named_modules() if isinstance(module, nn.AdaptiveAvgPool2d)}
    return [
        node
        for node in evaluation
        if isinstance(value := outputs[node], Tensor)
        and (value.ndim == 3 or (value.ndim == 4 and min(value.shape[2:]) > 1))
        and node not in fixed
    ][-1]


def _up_to(model: nn.Module, node: str, name: str) -> nn.Module:
    """Returns the model up to the node, as a module whose output is a dict with the node's output."""
    from torchvision.models.feature_extraction import create_feature_extractor

    try:
        return create_feature_extractor(model, [node], suppress_diff_warning=True)
    except ValueError:
        parts = [part for part, _ in model.named_children()]
        raise UserError(
            f"model.trunk.features: {name} has no node '{node}'{suggest(node, parts)}, or a part of one of these, such "
            "as layer3.0 of resnet18"
        ) from None
