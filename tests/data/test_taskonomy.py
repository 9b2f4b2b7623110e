"""Taskonomy's PNG files: values, missing pixels, splits by building."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command
from PIL import Image
from test_dense import MADE

import mtl
from mtl.data import taskonomy
from mtl.data.taskonomy import CLASSES, FOLDERS

BYTE, WORD = np.uint8, np.uint16


def put(root: Path, folder: str, building: str, view: int, values: object, kind: type) -> None:
    domain = {"segment_semantic": "segmentsemantic"}.get(folder, folder)
    path = root / folder / building / f"point_7_view_{view}_domain_{domain}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, kind)).save(path)


@pytest.fixture
def houses(tmp_path: Path) -> Path:
    """Two buildings with two views of 1 x 3 pixels, whose last pixel has no surface."""
    for building in ("hanson", "Merom"):
        for view in (0, 1):
            put(tmp_path, "rgb", building, view, [[[255, 0, 51]] * 3], BYTE)
            put(tmp_path, "depth_zbuffer", building, view, [[512, 768, 65535]], WORD)
            put(tmp_path, "depth_euclidean", building, view, [[1024, 65535, 512]], WORD)
            put(tmp_path, "mask_valid", building, view, [[0, 255, 255]], BYTE)
            nowhere = [128, 128, 127] if view == 0 else [0, 0, 0]
            put(tmp_path, "normal", building, view, [[[255, 128, 128], nowhere, [0, 128, 255]]], BYTE)
            put(tmp_path, "principal_curvature", building, view, [[[127, 255, 9], [63, 127, 9], [0, 0, 9]]], BYTE)
            put(tmp_path, "reshading", building, view, [[[51] * 3, [255] * 3, [0] * 3]], BYTE)
            put(tmp_path, "segment_semantic", building, view, [[0, 1, 17]], BYTE)
            for folder in ("edge_texture", "edge_occlusion", "keypoints2d", "keypoints3d"):
                put(tmp_path, folder, building, view, [[0, 13107, 65535]], WORD)
    (tmp_path / "train_val_test_tiny.csv").write_bytes(b"id,train,val,test\rhanson,1,0,0\rmerom,0,1,0\r")
    return tmp_path


def read(root: Path, *maps: str, **options: object) -> mtl.data.Splits:
    settings = {"split": str(root / "train_val_test_tiny.csv"), "size": [1, 3], **options}
    return taskonomy(root=str(root), maps=maps or list(FOLDERS), **settings)


def test_values_and_missing_pixels(houses: Path) -> None:
    splits = read(houses)
    assert [(name, len(dataset)) for name, dataset in splits.items()] == [("train", 2), ("val", 2)]
    assert splits.facts["size"] == [1, 3]
    sample = splits.val[0]
    assert set(sample) == {"image", *FOLDERS}
    nan, root = float("nan"), 0.5**0.5
    small = 1 / 255  # 128 / 127.5 - 1
    wanted = {
        "image": [[[1.0] * 3], [[0.0] * 3], [[0.2] * 3]],
        "depth_zbuffer": [[1.0, 1.5, nan]],
        "depth_euclidean": [[2.0, nan, nan]],  # its own missing pixel, and that of the mask
        "edge_texture": [[0.0, 0.2, 1.0]],
        "keypoints2d": [[0.0, 0.2, 1.0]],
        "edge_occlusion": [[0.0, 0.2, nan]],
        "keypoints3d": [[0.0, 0.2, nan]],
        "principal_curvature": [[[0.0, -0.5, nan]], [[1.0, 0.0, nan]]],
        "reshading": [[0.2, 1.0, nan]],
        "segment_semantic": [[-100, 0, 16]],
        "normal": [[[1.0, nan, nan]], [[small, nan, nan]], [[small, nan, nan]]],
    }
    for name, values in wanted.items():
        expected = torch.tensor(values)
        torch.testing.assert_close(sample[name], expected, rtol=0, atol=5e-5, equal_nan=True)
    assert CLASSES[0] == "background"
    assert CLASSES[16] == "vase"
    other = read(houses, "normal", "depth_zbuffer", mask="mask_valid").train[1]
    torch.testing.assert_close(other["depth_zbuffer"], torch.tensor([[nan, 1.5, nan]]), equal_nan=True)
    normals = torch.tensor([[[nan, nan, -root]], [[nan, nan, 0.0]], [[nan, nan, root]]])
    torch.testing.assert_close(other["normal"], normals, rtol=0, atol=3e-3, equal_nan=True)
    whole = read(houses, "normal", mask=None).train[1]
    assert whole["normal"].isnan()[0].tolist() == [[False, True, False]]
    torch.testing.assert_close(whole["normal"].norm(dim=0)[0, [0, 2]], torch.ones(2))


def test_maps_take_the_nearest_value_in_another_size_and_move_together(houses: Path) -> None:
    from torchvision.transforms.v2 import RandomHorizontalFlip

    sample = read(houses, "depth_zbuffer", "segment_semantic", "normal", size=[2, 6]).train[0]
    assert sample["image"].shape == (3, 2, 6)
    assert sample["segment_semantic"].tolist() == [[-100, -100, 0, 0, 16, 16]] * 2
    assert sample["depth_zbuffer"][:, :4].tolist() == [[1.0, 1.0, 1.5, 1.5]] * 2
    assert sample["depth_zbuffer"][:, 4:].isnan().all()
    splits = read(houses, "normal", "segment_semantic", "keypoints3d", mask=None, augment=RandomHorizontalFlip(1.0))
    flipped, plain = splits.train[0], splits.val[0]  # both buildings have the same files
    assert flipped["segment_semantic"].tolist() == [[16, 0, -100]]
    assert torch.equal(flipped["keypoints3d"], plain["keypoints3d"].flip(-1))
    turned = plain["normal"].flip(-1) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    torch.testing.assert_close(flipped["normal"], turned, equal_nan=True)


def test_each_file_is_read_once_for_a_sample(houses: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or original(path))
    data = read(houses).train
    for index in (1, 0, 1):  # sample 0 may have been read at the start
        opened.clear()
        assert set(data[index]) == {"image", *FOLDERS}
        assert len(opened) == len(set(opened)) == 1 + len(FOLDERS)


def test_the_layout_of_the_download_tool(houses: Path) -> None:
    for folder in [path for path in houses.iterdir() if path.is_dir()]:
        inner = folder / "taskonomy"
        inner.mkdir()
        for building in ("hanson", "Merom"):
            (folder / building).rename(inner / building)
    assert len(read(houses).train) == 2


def test_missing_pieces(houses: Path) -> None:
    with pytest.raises(mtl.UserError, match=r"data.maps: there is no map 'normals'; did you mean 'normal'"):
        read(houses, "normals")
    with pytest.raises(mtl.UserError, match=r"data.mask: there is no map 'normal'"):
        read(houses, "normal", mask="normal")
    with pytest.raises(mtl.UserError, match=r"data.split: .*no.csv can't be read .* columns id, train, val and test"):
        read(houses, split=str(houses / "no.csv"))
    (houses / "wrong.csv").write_text("id,train\nhanson,1\n")
    with pytest.raises(mtl.UserError, match=r"data.split: .*wrong.csv can't be read"):
        read(houses, split=str(houses / "wrong.csv"))
    lost = houses / "normal" / "hanson" / "point_7_view_1_domain_normal.png"
    lost.unlink()
    splits = read(houses)
    assert splits.warnings == ["data.maps: pictures that are left out, since some of their maps are missing: 1"]
    assert len(splits.train) == 1
    lost.with_name("point_7_view_0_domain_normal.png").write_bytes(b"no picture")
    with pytest.raises(mtl.UserError, match=r"point_7_view_0_domain_normal.png can't be read"):
        read(houses)
    put(houses, "normal", "hanson", 0, [[1, 2, 3]], BYTE)
    with pytest.raises(mtl.UserError, match=r"has 1 channel; a file of normal must have 3"):
        read(houses)
    (houses / "normal").rename(houses / "elsewhere")
    with pytest.raises(mtl.UserError, match=r"data.root: there is no folder .*normal/hanson.*remove its row"):
        read(houses)


@pytest.mark.slow
def test_a_training_on_made_rooms(here: Path) -> None:
    MADE.write_taskonomy(here / "data" / "taskonomy", {"train": 4, "val": 2, "test": 2}, (32, 32), 0)
    maps = MADE.as_taskonomy(MADE.scene(32, 32, np.random.default_rng(0)))
    first = taskonomy(root="data/taskonomy", maps=["depth_zbuffer", "normal"], size=32).train[0]
    depth = np.where(maps["depth_zbuffer"] == 65535, np.nan, maps["depth_zbuffer"] / 512)
    np.testing.assert_allclose(first["depth_zbuffer"].numpy(), depth, rtol=1e-6)
    small = ["model.trunk.name=resnet18", "model.trunk.replace_stride_with_dilation=null", "data.size=32"]
    heads = [f"+tasks.{name}.head.channels=8" for name in ("segmentation", "depth", "normals", "keypoints", "edges")]
    ended = command(
        "train",
        "task=taskonomy",
        *small,
        *heads,
        "data.batch_size=2",
        "data.num_workers=0",
        "trainer.max_epochs=1",
        "logger=[]",
    )
    assert ended.code == 0, ended.err
    assert ended.metrics["steps"] == 2
    figures = ended.metrics["test"]
    assert set(figures) == {"segmentation", "depth", "normals", "keypoints", "edges"}
    assert figures["depth"]["error.absolute"] > 0
