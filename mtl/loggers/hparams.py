"""Summaries for TensorBoard's HParams tab."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Value = int | float | str


def beginning(options: Mapping[str, Value], swept: Collection[str], finals: Sequence[str]) -> list[Any]:
    """Returns the summaries at the start of a run: the definition of the columns, and the values of the run.

    Args:
        options: The options of the run, by name.
        swept: The names of options that differ between runs, which TensorBoard shows first.
        finals: The tags of the metrics by which runs are compared.
    """
    from tensorboard.plugins.hparams.api_pb2 import (
        DATA_TYPE_FLOAT64,
        DATA_TYPE_STRING,
        Experiment,
        HParamInfo,
        MetricInfo,
        MetricName,
    )
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    columns = [
        HParamInfo(
            name=name,
            type=DATA_TYPE_FLOAT64 if _is_number(value) else DATA_TYPE_STRING,
            differs=name in swept,
        )
        for name, value in options.items()
    ]
    figures = [MetricInfo(name=MetricName(tag=tag)) for tag in finals]
    start = SessionStartInfo()
    for name, value in options.items():
        if _is_number(value):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    experiment = HParamsPluginData(experiment=Experiment(hparam_infos=columns, metric_infos=figures))
    return [
        _summary(EXPERIMENT_TAG, experiment),
        _summary(SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start)),
    ]


def ending() -> Any:
    """Returns the summary at the end of a finished run."""
    from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
    from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    return _summary(SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=SessionEndInfo(status=STATUS_SUCCESS)))


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float)


def _summary(tag: str, content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.metadata import NULL_TENSOR, create_summary_metadata

    summary = Summary()
    summary.value.add(tag=tag, tensor=NULL_TENSOR, metadata=create_summary_metadata(content))
    return summary
