"""Events are read back and compared with what was logged."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from mtl.loggers import TensorBoardLogger
from mtl.loggers.tensorboard import layout


def test_scalars_and_layout(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, ["a", "b"])
    logger.log(1, 1, {"loss/a/train": 0.5, "cosine/a~b": -0.25})
    logger.log(7, 2, {"loss/a/train": 0.125})
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/a/train")] == [(1, 0.5), (7, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("cosine/a~b")] == [(1, -0.25)]
    stored = layout_pb2.Layout()
    stored.ParseFromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in stored.category[0].chart}
    assert charts["cosine"] == ["^cosine/a\\~b$"] or charts["cosine"] == ["^cosine/a~b$"]
    assert charts["loss (train)"] == ["^loss/a/train$", "^loss/b/train$"]
    assert set(charts) == {"loss (train)", "loss (val)", "gradient norm", "weight", "cosine"}


def test_one_task_has_no_cosine() -> None:
    assert "cosine" not in layout(["a"])["tasks"]
