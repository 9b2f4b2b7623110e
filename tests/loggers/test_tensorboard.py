"""Events are read back and compared with what was logged."""

import re
from pathlib import Path

from conftest import Ended
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mtl.loggers import TensorBoardLogger
from mtl.loggers.tensorboard import layout


def test_scalars_and_layout(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, ["a", "b"])
    logger.log(1, 1, {"loss/a/train": 0.5, "cosine/a~b": -0.25})
    logger.log(7, 2, {"loss/a/train": 0.125})
    logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/a/train")] == [(1, 0.5), (7, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("cosine/a~b")] == [(1, -0.25)]
    stored = layout_pb2.Layout()
    stored.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in stored.category[0].chart}
    assert {name for name, (regex,) in charts.items() if re.match(regex, "cosine/a~b")} == {"cosine"}
    assert {name for name, (regex,) in charts.items() if re.match(regex, "loss/b/train")} == {"loss (train)"}
    assert set(charts) == {
        *("loss (train)", "loss (val)", "gradient norm", "weight", "cosine", "learning rate", "samples per second")
    }


def test_a_metric_has_one_chart_for_all_its_tasks() -> None:
    finals = [f"metric/{name}/{split}" for split in ("best", "test") for name in ("a/accuracy", "b/accuracy", "c/mae")]
    charts = layout(["a", "b", "c"], ["monitor/best", *finals, "loss/a/test"])["tasks"]
    tags = ["metric/a/accuracy/val", "metric/b/accuracy/val", "metric/c/mae/val", "metric/a/accuracy/test"]
    found = {name: [tag for tag in tags if re.match(regex[0], tag)] for name, (_, regex) in charts.items()}
    assert found["accuracy (val)"] == tags[:2]
    assert found["mae (val)"] == tags[2:3]


def test_a_metric_s_name_is_no_pattern() -> None:
    charts = layout(["a"], ["metric/a/f(0.5)/best"])["tasks"]
    (pattern,) = charts["f(0.5) (val)"][1]
    tags = ["metric/a/f(0.5)/val", "metric/a/f0.5/val", "metric/a/f(0x5)/val"]
    assert [tag for tag in tags if re.match(pattern, tag)] == tags[:1]


def test_every_chart_of_a_run_has_a_line(trained: Ended) -> None:
    """The patterns of the layout that a run wrote, against the tags it wrote."""
    assert trained.run is not None
    events = EventAccumulator(str(trained.run))
    events.Reload()
    stored = layout_pb2.Layout()
    stored.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    found = {
        chart.title: sorted(tag for tag in events.Tags()["scalars"] if re.match(chart.multiline.tag[0], tag))
        for chart in stored.category[0].chart
    }
    assert found == {
        "loss (train)": ["loss/digit/train", "loss/parity/train"],
        "loss (val)": ["loss/digit/val", "loss/parity/val"],
        "accuracy (val)": ["metric/digit/accuracy/val", "metric/parity/accuracy/val"],
        "gradient norm": ["grad_norm/digit", "grad_norm/parity", "grad_norm/total"],
        "weight": ["weight/digit", "weight/parity"],
        "cosine": ["cosine/digit~parity"],
        "learning rate": ["lr/default"],
        "samples per second": ["speed/samples_per_second"],
    }


def test_runs_of_other_tasks_have_the_same_charts() -> None:
    """TensorBoard makes one chart of those that are equal, and several of those of one name that aren't."""
    one, both = (
        layout(["a"], ["metric/a/accuracy/val"])["tasks"],
        layout(["a", "b"], ["metric/b/accuracy/val"])["tasks"],
    )
    assert one.items() <= both.items()


def test_what_a_run_is_and_how_it_ended(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, ["a"])
    logger.begin(
        "seed: 3\n", {"seed": 3, "balancer": "equal", "trainer.clip_norm": "null"}, ["seed"], ["metric/a/mae/test"]
    )
    logger.log(1, 1, {"metric/a/mae/test": 0.5})
    state = logger.state_dict()
    logger.end()
    logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tensors("config/text_summary")[0].tensor_proto.string_val == [b"```yaml\nseed: 3\n\n```"]
    contents = events.PluginTagToContent("hparams")
    told = {tag: HParamsPluginData.FromString(content) for tag, content in contents.items()}
    experiment = told["_hparams_/experiment"].experiment
    assert [(each.name, each.differs) for each in experiment.hparam_infos] == [
        *(("seed", True), ("balancer", False), ("trainer.clip_norm", False))
    ]
    assert [each.name.tag for each in experiment.metric_infos] == ["metric/a/mae/test"]
    start = told["_hparams_/session_start_info"].session_start_info.hparams
    assert start["seed"].number_value == 3
    assert start["trainer.clip_norm"].string_value == "null"
    assert told["_hparams_/session_end_info"].session_end_info.status == STATUS_SUCCESS

    again = TensorBoardLogger(tmp_path, ["a"])  # a run that goes on says none of it twice, and isn't finished
    again.begin("seed: 3\n", {"seed": 3}, [], [])
    again.load_state_dict(state)
    again.log(2, 1, {"metric/a/mae/test": 0.25})
    again.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("metric/a/mae/test")] == [(1, 0.5), (2, 0.25)]
    assert len(events.Tensors("config/text_summary")) == 1
    assert set(events.PluginTagToContent("hparams")) == {"_hparams_/experiment", "_hparams_/session_start_info"}


def test_one_task_has_no_cosine() -> None:
    assert "cosine" not in layout(["a"])["tasks"]
