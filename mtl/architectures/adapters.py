"""One trunk, with a small module for each task after each of its stages: FiLM layers or adapters."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from mtl.architectures.mixing import by_channel, channels_of, check_channels, replaced
from mtl.batch import Batch
from mtl.errors import UserError
from mtl.model import MultiTaskModel
from mtl.task import Task
from mtl.trunks.stages import new_trunk, run_stages, stages_of, tensor_of


class Adapters(MultiTaskModel):
    """One trunk for all tasks, each of whose stages is followed by a small module of the task's own.

    With `film`, the module multiplies each channel by a learned scale and adds a learned shift. With `adapter`, it adds
    W₂ · relu(W₁ · x + b₁) + b₂ to each position x of its input, where W₁ maps the channels to a few and W₂ maps these
    back; in maps, these are 1×1 convolutions. Both start as the identity, so that the model starts as a trunk with hard
    parameter sharing. The modules are `model.adapters[task.name]`, a list with one for each stage.

    Only the first stage gets the same input for all tasks. It is called once, and the later stages once for each task.
    Their parameters are shared nevertheless, unless they are frozen, as usual with `model.freeze: [trunk]`. The running
    statistics of batch norm in later stages that aren't frozen are those of all tasks together.

    Args:
        trunk: A function that creates the trunk; it is called once.
        tasks: The tasks, at least one, with distinct names.
        inputs: The names of the batch's fields that are the inputs of the trunk.
        kind: `film` or `adapter`.
        width: The number of channels that W₁ maps to, in adapters.

    Raises:
        UserError: If the kind is unknown, or if the width isn't positive.

    Sources: Perez et al., "FiLM: visual reasoning with a general conditioning layer", AAAI 2018, here with one
    constant scale and shift for each task; Houlsby et al., "Parameter-efficient transfer learning for NLP", ICML 2019;
    Rebuffi et al., "Learning multiple visual domains with residual adapters", NeurIPS 2017, for 1×1 convolutions.
    """

    one_representation = False  # the later stages are shared and follow after the features

    def __init__(
        self,
        trunk: Callable[[], nn.Module],
        tasks: Sequence[Task],
        *,
        inputs: Sequence[str],
        kind: str = "film",
        width: int = 16,
    ) -> None:
        if kind not in ("film", "adapter"):
            raise UserError(f"model.kind: '{kind}' is not one of film, adapter")
        if width < 1:
            raise UserError(f"model.width is {width}; an adapter needs at least one channel")
        super().__init__(new_trunk(trunk), tasks, inputs=inputs)
        # In a tuple, since the modules are already members of the trunk, under the names of a trunk without adapters.
        self._stages = tuple(stages_of(self.trunk))

        def adapter() -> nn.Module:
            return Film() if kind == "film" else Adapter(width)

        self.adapters = nn.ModuleDict({task.name: nn.ModuleList(adapter() for _ in self._stages) for task in tasks})

    @property
    def shared(self) -> nn.Module:
        """The first stage of the trunk, the only one that gets the same input for all tasks."""
        return self._stages[0]

    def features(self, batch: Batch) -> Any:
        """Computes the output of the trunk's first stage."""
        return self._encode(self._stages[0], self._inputs_of(batch))

    def predict(self, task: str, features: Any) -> Any:
        """Computes the prediction of a task with the task's adapters, the later stages and the head of the task."""
        value = features
        for number, (stage, adapter) in enumerate(zip(self._stages, self._adapters(task), strict=True)):
            if number:  # the features are the output of the first stage
                value = run_stages([stage], value)
            check_channels(value, stage)
            value = adapter(value)
        return super().predict(task, value)

    def own_part(self, task: str) -> nn.Module:
        """Returns the first adapter of a task."""
        return self._adapters(task)[0]

    def _adapters(self, task: str) -> list[nn.Module]:
        return list(self.adapters[task].children())


class Film(LazyModuleMixin, nn.Module):
    """Multiplies each channel by a scale and adds a shift. The number of channels is inferred from the first input.

    Attributes:
        scale, shift: The parameters, (C,), initially 1 and 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = UninitializedParameter()
        self.shift = UninitializedParameter()

    def initialize_parameters(self, value: Any) -> None:
        """Creates the parameters for the channels of the value."""
        if self.has_uninitialized_params():
            tensor = tensor_of(value)
            with torch.no_grad():
                for parameter, start in ((self.scale, 1.0), (self.shift, 0.0)):
                    parameter.materialize((tensor.shape[channels_of(tensor)],))
                    parameter.fill_(start)

    def forward(self, value: Any) -> Any:
        """Returns the value with another tensor at its beginning."""
        x = tensor_of(value)
        return replaced(value, x * by_channel(self.scale, x) + by_channel(self.shift, x))


class Adapter(LazyModuleMixin, nn.Module):
    """Adds a function of its channels to each position. The number of channels is inferred from the first input.

    Args:
        width: The number of hidden channels.

    Attributes:
        down, down_bias, up, up_bias: The parameters W₁ (width, C), b₁ (width,), W₂ (C, width), initially 0, and
            b₂ (C,), initially 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.down = UninitializedParameter()
        self.down_bias = nn.Parameter(torch.empty(width))
        self.up = UninitializedParameter()
        self.up_bias = UninitializedParameter()
        nn.init.zeros_(self.down_bias)

    def initialize_parameters(self, value: Any) -> None:
        """Creates the parameters for the channels of the value."""
        if self.has_uninitialized_params():
            tensor = tensor_of(value)
            channels = tensor.shape[channels_of(tensor)]
            with torch.no_grad():
                self.down.materialize((self.width, channels))
                self.up.materialize((channels, self.width))
                self.up_bias.materialize((channels,))
                nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
                nn.init.zeros_(self.up)
                nn.init.zeros_(self.up_bias)

    def forward(self, value: Any) -> Any:
        """Returns the value with another tensor at its beginning."""
        x = tensor_of(value)
        positions: Tensor = x.movedim(channels_of(x), -1)
        change = F.linear(F.relu(F.linear(positions, self.down, self.down_bias)), self.up, self.up_bias)
        return replaced(value, x + change.movedim(-1, channels_of(x)))
