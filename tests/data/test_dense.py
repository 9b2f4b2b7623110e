"""Pictures with maps: the files, missing values, and augmentation of all maps together."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from torchvision.transforms import v2

import mtl
from mtl.data import Loader, cityscapes, dense, nyuv2
from mtl.data.augment import Depth, InverseDepth, Normals, RandomScaleCrop
from mtl.data.dense import Maps
from mtl.report import main

SPEC = importlib.util.spec_from_file_location("make_dense", ROOT / "scripts" / "make_dense.py")
assert SPEC is not None
assert SPEC.loader is not None
MADE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MADE)
MAPS = {"label": "classes", "depth": "depth", "normal": "normals"}


@pytest.fixture
def rooms(tmp_path: Path) -> Path:
    MADE.write(tmp_path, "nyuv2", {"train": 11, "val": 3}, (16, 24), 0)
    return tmp_path


def test_the_made_maps_fit_each_other() -> None:
    maps = MADE.scene(64, 96, np.random.default_rng(1))
    v, u = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 96), indexing="ij")
    points = np.stack([u, v, np.ones_like(u)], -1) * maps["depth"]
    across, along = np.gradient(points, axis=1), np.gradient(points, axis=0)
    normals = np.cross(along, across)
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    inner = np.zeros((64, 96), bool)
    inner[2:-2, 2:-2] = True
    for kind in (4, 6, 11):  # floor, balls, wall; away from the edges of objects
        same = inner & (maps["label"] == kind)
        for axis in (0, 1):
            for shift in (-2, -1, 1, 2):
                same &= np.roll(maps["label"], shift, axis) == kind
        cosines = (normals * maps["normal"]).sum(-1)[same]
        assert same.sum() > 30
        assert np.median(np.abs(cosines)) > 0.99
        assert np.sign(np.median(cosines)) == -1 or np.median(cosines) > 0.99


def test_fields_and_missing_values(rooms: Path) -> None:
    splits = nyuv2(root=str(rooms), validation=0.2)
    assert [len(dataset) for _, dataset in splits.items()] == [9, 2, 3]
    assert splits.facts["size"] == [16, 24]
    assert splits.facts["names"][11] == "wall"
    sample = splits.test[2]
    assert {n: (v.dtype, tuple(v.shape)) for n, v in sample.items()} == {
        "image": (torch.float32, (3, 16, 24)),
        "label": (torch.int64, (16, 24)),
        "depth": (torch.float32, (16, 24)),
        "normal": (torch.float32, (3, 16, 24)),
    }
    files = {name: np.load(rooms / "val" / name / "2.npy") for name in sample}
    assert np.array_equal(sample["image"].numpy(), files["image"].transpose(2, 0, 1))
    assert np.array_equal(sample["label"].numpy(), np.where(files["label"] == -1, -100, files["label"]))
    assert (sample["label"] == -100).sum() == 48  # the first and the last row
    for name in ("depth", "normal"):
        values = torch.from_numpy(files[name]).movedim(2, 0)
        missing = (values == 0).all(0, keepdim=True).expand_as(values)
        assert torch.equal(sample[name].reshape(values.shape).isnan(), missing)
        assert torch.equal(sample[name].reshape(values.shape)[~missing], values[~missing])


def test_without_a_share_for_validation_val_is_for_validation(rooms: Path) -> None:
    splits = nyuv2(root=str(rooms), validation=0)
    assert [(name, len(dataset)) for name, dataset in splits.items()] == [("train", 11), ("val", 3)]


def test_cityscapes_has_inverse_depths(tmp_path: Path) -> None:
    MADE.write(tmp_path, "cityscapes", {"train": 4, "val": 2}, (8, 12), 0)
    splits = cityscapes(root=str(tmp_path), validation=0)
    assert list(splits.train[0]) == ["image", "label", "depth"]
    assert 0 < float(splits.train[0]["depth"].nan_to_num().max()) < 2
    assert splits.facts["names"] == ["flat", "construction", "object", "nature", "sky", "human", "vehicle"]
    with pytest.raises(mtl.UserError, match="data.classes is 8; it must be 7 or 19"):
        cityscapes(root=str(tmp_path), classes=8)


def test_files_that_are_wrong(rooms: Path) -> None:
    with pytest.raises(mtl.UserError, match="there are no files .*elsewhere/train/image/0.npy"):
        dense(root=str(rooms / "elsewhere"), maps=MAPS)
    with pytest.raises(mtl.UserError, match=r"data\.maps\.depth: there is no kind 'dept'; did you mean 'depth'"):
        dense(root=str(rooms), maps={"depth": "dept"})
    (rooms / "train" / "depth" / "7.npy").unlink()
    with pytest.raises(mtl.UserError, match=r"must have the same files; only one of them has 7\.npy"):
        nyuv2(root=str(rooms))
    np.save(rooms / "train" / "depth" / "7.npy", np.zeros((16, 25, 1)))
    with pytest.raises(mtl.UserError, match=r"picture and maps 7\.npy in .* have unlike sizes: .*\(16, 25\)"):
        Maps(rooms / "train", MAPS)[7]
    np.save(rooms / "train" / "normal" / "0.npy", np.zeros((16, 24, 2)))
    with pytest.raises(mtl.UserError, match=r"0\.npy is of shape \(16, 24, 2\); it must be \(H, W, 3\)"):
        Maps(rooms / "train", MAPS)[0]
    (rooms / "train" / "image" / "1.npy").write_bytes(b"nothing")
    with pytest.raises(mtl.UserError, match=r"image/1\.npy can't be read"):
        Maps(rooms / "train", MAPS)[1]
    np.save(rooms / "train" / "image" / "2.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(mtl.UserError, match=r"image/2\.npy can't be read"):
        Maps(rooms / "train", MAPS)[2]


def test_a_flip_turns_normals_and_moves_all_maps(rooms: Path) -> None:
    plain = Maps(rooms / "train", MAPS)[0]
    flipped = Maps(rooms / "train", MAPS, augment=v2.RandomHorizontalFlip(1.0))[0]
    for name in ("image", "label", "depth"):
        assert torch.equal(flipped[name].nan_to_num(-1), plain[name].flip(-1).nan_to_num(-1))
        assert type(flipped[name]) is torch.Tensor
    sign = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    assert torch.equal(flipped["normal"].nan_to_num(9), (sign * plain["normal"].flip(-1)).nan_to_num(9))
    upside_down = v2.functional.vertical_flip(Normals(torch.ones(3, 1, 2)))
    assert upside_down[:, 0, 0].tolist() == [1, -1, 1]
    with pytest.raises(mtl.UserError, match="normals can be cropped, resized and flipped; rotations"):
        v2.RandomRotation([30, 30])(Normals(torch.ones(3, 4, 4)))


def test_an_enlargement_divides_depths_and_multiplies_inverse_ones() -> None:
    grid = torch.arange(1.0, 17.0).view(1, 4, 4)
    sample = {"d": Depth(grid), "i": InverseDepth(grid), "n": Normals(torch.cat([grid, grid, grid]))}
    torch.manual_seed(0)
    moved = RandomScaleCrop([2.0])(sample)
    corner = moved["n"][0, 0, 0]  # the value at the part's corner says where the part was
    top, left = divmod(int(corner) - 1, 4)
    wanted = grid[:, top : top + 2, left : left + 2].repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(moved["n"].as_subclass(torch.Tensor), wanted.expand(3, 4, 4))
    assert torch.equal(moved["d"].as_subclass(torch.Tensor), wanted / 2)
    assert torch.equal(moved["i"].as_subclass(torch.Tensor), wanted * 2)
    unmoved = RandomScaleCrop([1.0])(sample)
    assert all(torch.equal(unmoved[name], sample[name]) for name in sample)
    drawn = [RandomScaleCrop([2.0])(sample)["n"][0, 0, 0].item() for _ in range(200)]
    assert set(drawn) == {1, 2, 3, 5, 6, 7, 9, 10, 11}  # every part that fits
    with pytest.raises(mtl.UserError, match=r"scales is \[0.5\]; it must be numbers of at least 1"):
        RandomScaleCrop([0.5])


def test_what_a_transform_fills_in_is_missing(rooms: Path) -> None:
    maps = {"label": "classes", "depth": "values"}
    crop = v2.RandomCrop((16, 24), padding=4)
    splits = dense(root=str(rooms), maps=maps, augment=crop, validation=0)
    assert splits.warnings == [
        "data.validation=0: best.pt is chosen on val, whose figures at best.pt are therefore too good"
    ]
    plain = dense(root=str(rooms), maps=maps, validation=0.1)
    assert plain.warnings == ()
    wholes = Maps(rooms / "train", maps)
    filled = 0
    for index in range(len(splits.train)):
        torch.manual_seed(index)
        sample, whole = splits.train[index], wholes[index]
        torch.manual_seed(index)
        where = crop(torch.ones(1, 16, 24, dtype=torch.float32))[0] == 0  # what the same draw fills in
        filled += int(where.sum())
        assert (sample["label"][where] == -100).all()
        assert sample["depth"][where].isnan().all()
        assert (sample["label"][~where] == -100).sum() <= (whole["label"] == -100).sum()
        assert not sample["depth"][~where].isnan().any()
    assert filled > 100


def test_one_draw_a_sample_by_seed_and_epoch_for_any_number_of_workers(rooms: Path) -> None:
    augment = [RandomScaleCrop([1.0, 1.2, 1.5]), v2.RandomHorizontalFlip()]
    data = Maps(rooms / "train", MAPS, augment=augment)

    def pictures(workers: int, epoch: int, seed: int = 0) -> torch.Tensor:
        loader = Loader(data, batch_size=4, seed=seed, num_workers=workers)
        return torch.cat([batch["image"] for batch in loader.batches(epoch)])

    first = pictures(0, 1)
    assert torch.equal(first, pictures(2, 1))
    assert not torch.equal(first, pictures(0, 2))
    assert not torch.equal(first, pictures(0, 1, seed=1))


def test_a_training_on_made_rooms(rooms: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    small = ["model.trunk.name=resnet18", "model.trunk.replace_stride_with_dilation=null", "data.num_workers=0"]
    heads = [f"+tasks.{name}.head.channels=8" for name in ("segmentation", "depth", "normals")]
    where = [f"data.root={rooms}", f"output_root={rooms}/outputs"]
    monitor = ["trainer.monitor={normals/angle.mean: min}", "trainer.max_epochs=2"]
    ended = command("train", "task=nyuv2", *small, *heads, *where, *monitor)
    assert ended.code == 0, ended.err
    assert "normals/angle.mean (min)" in ended.out
    folder = next(rooms.glob("outputs/nyuv2/*"))
    logged = (folder / "metrics.csv").read_text()
    for tag in ("normals/angle.within_11.25", "depth/error.relative", "segmentation/class_iou.wall"):
        assert f"metric/{tag}/val" in logged
    monkeypatch.setattr("sys.argv", ["mtl.report", str(rooms / "outputs"), "--out", str(rooms / "page")])
    main()
    page = capsys.readouterr().out + "".join(path.read_text() for path in (rooms / "page").rglob("*.md"))
    for heading in ("normals angle.mean↓", "normals angle.within_30↑", "segmentation class_iou.wall↑"):
        assert heading.split(" ", 1)[1] in page
