"""Writes small made data sets in the layouts of NYUv2 and Cityscapes that MTAN and LibMTL use, and of Taskonomy.

Each picture is the view of a wall, a floor and some balls and boxes, rendered with a light at the camera, so that
picture, classes, depths and normals fit each other:

    python scripts/make_dense.py data/nyuv2
    python scripts/make_dense.py data/cityscapes --kind cityscapes
    python scripts/make_dense.py data/taskonomy --kind taskonomy
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

WALL, FLOOR, BALL, BOX = 11, 4, 6, 5  # classes of NYUv2: wall, floor, objects, furniture
COLOURS = {WALL: (0.8, 0.8, 0.7), FLOOR: (0.5, 0.4, 0.3), BALL: (0.8, 0.2, 0.2), BOX: (0.2, 0.3, 0.8)}
OF_CITYSCAPES = {WALL: 1, FLOOR: 0, BALL: 5, BOX: 6, -1: -1}  # construction, flat, human, vehicle

OF_TASKONOMY = {WALL: 1, FLOOR: 1, BALL: 17, BOX: 4, -1: 0}  # background, vase, couch, uncertain


def scene(height: int, width: int, draws: np.random.Generator) -> dict[str, np.ndarray]:
    """Renders one scene.

    The camera is at the origin and looks along z; x points to the right and y down. A pixel (u, v) sees along the ray
    (u, v, 1), where u and v are from -1 to 1, so that the depth is the z-coordinate of what it sees.

    Returns:
        image (H, W, 3) in [0, 1], label (H, W), depth (H, W, 1) and normal (H, W, 3), which points to the camera.
    """
    v, u = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    ray = np.stack([u, v, np.ones_like(u)], -1)
    depth = np.full((height, width), draws.uniform(4, 6))  # of the wall
    label = np.full((height, width), WALL)
    normal = np.tile([0.0, 0.0, -1.0], (height, width, 1))

    def see(distance: np.ndarray, kind: int, direction: np.ndarray) -> None:
        nearer = (distance > 0) & (distance < depth)
        depth[nearer], label[nearer], normal[nearer] = distance[nearer], kind, direction[nearer]

    with np.errstate(divide="ignore"):
        see(np.where(v > 0, draws.uniform(0.8, 1.5) / v, np.inf), FLOOR, np.tile([0.0, -1.0, 0.0], (height, width, 1)))
    for _ in range(draws.integers(1, 4)):
        centre, radius = np.array([*draws.uniform(-1.5, 1.5, 2), draws.uniform(2, 4)]), draws.uniform(0.4, 0.9)
        # The ray t · ray meets the ball where |t · ray - centre| = radius.
        a, b, c = (ray**2).sum(-1), ray @ centre, centre @ centre - radius**2
        distance = (b - np.sqrt(np.maximum(b**2 - a * c, 0))) / a
        see(np.where(b**2 > a * c, distance, np.inf), BALL, (distance[..., None] * ray - centre) / radius)
    left, top, front = draws.uniform(-1.5, 0.5), draws.uniform(-1.0, 0.5), draws.uniform(2, 3.5)
    inside = (front * u > left) & (front * u < left + 1) & (front * v > top) & (front * v < top + 1)
    see(np.where(inside, front, np.inf), BOX, np.tile([0.0, 0.0, -1.0], (height, width, 1)))
    light = np.abs((normal * ray).sum(-1)) / np.sqrt((ray**2).sum(-1))
    colours = np.stack([np.choose(label, [COLOURS.get(n, (0, 0, 0))[c] for n in range(13)]) for c in range(3)], -1)
    image = np.clip(colours * light[..., None] + draws.normal(0, 0.02, colours.shape), 0, 1)
    edge = np.zeros((height, width), bool)  # nothing is known along the border, as in measured data
    edge[:1], edge[-1:] = True, True
    label[edge], depth[edge], normal[edge] = -1, 0, 0
    return {"image": image, "label": label, "depth": depth[..., None], "normal": normal}


def write(root: Path, kind: str, counts: dict[str, int], size: tuple[int, int], seed: int) -> None:
    """Writes the samples of each split as `{root}/{split}/{map}/{number}.npy`."""
    draws = np.random.default_rng(seed)
    for split, count in counts.items():
        for number in range(count):
            maps = scene(*size, draws)
            if kind == "cityscapes":
                del maps["normal"]
                maps["label"] = np.vectorize(OF_CITYSCAPES.get)(maps["label"])
                maps["label_7"] = maps["label"]  # the name in MTAN's files; LibMTL's have the other one
                maps["depth"] = np.where(maps["depth"] > 0, 1 / np.maximum(maps["depth"], 1e-6), 0)
            for name, values in maps.items():
                path = root / split / name / f"{number}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, values.astype(np.float32))


def as_taskonomy(maps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts the maps of a scene to the integers of Taskonomy's files, by folder."""
    height, width = maps["label"].shape
    v, u = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    depth, image = maps["depth"][..., 0], maps["image"]
    missing = depth == 0
    down, right = np.gradient(image.mean(-1))

    def metres(values: np.ndarray) -> np.ndarray:
        return np.where(missing, 65535, np.round(values * 512)).astype(np.uint16)

    def share(values: np.ndarray) -> np.ndarray:
        return np.round(np.clip(values, 0, 1) * 65535).astype(np.uint16)

    return {
        "rgb": np.round(image * 255).astype(np.uint8),
        "depth_zbuffer": metres(depth),
        "depth_euclidean": metres(depth * np.sqrt(u**2 + v**2 + 1)),
        "normal": np.floor((maps["normal"] + 1) * 127.5 + 0.5).astype(np.uint8),  # 128 where missing
        "segment_semantic": np.vectorize(OF_TASKONOMY.get)(maps["label"]).astype(np.uint8),
        "edge_texture": share(np.hypot(down, right)),
        "edge_occlusion": share(np.hypot(*np.gradient(depth))),
        "keypoints2d": share(np.abs(down * right) * 10),
    }


def write_taskonomy(root: Path, counts: dict[str, int], size: tuple[int, int], seed: int) -> None:
    """Writes the samples as `{root}/{folder}/{building}/{view}.png`, one building a split, and the splits' CSV file."""
    draws = np.random.default_rng(seed)
    rows = ["id,train,val,test"]
    for split, count in counts.items():
        rows.append(",".join([f"made{split}", *("1" if split == each else "0" for each in ("train", "val", "test"))]))
        for number in range(count):
            for folder, values in as_taskonomy(scene(*size, draws)).items():
                domain = folder.replace("segment_semantic", "segmentsemantic")
                path = root / folder / f"made{split}" / f"point_{number}_view_0_domain_{domain}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
    (root / "train_val_test_tiny.csv").write_text("\n".join(rows) + "\n")


def main() -> None:
    """Reads the command line and writes the files."""
    parser = argparse.ArgumentParser(description="Write a small made data set of rendered shapes.")
    parser.add_argument("root", type=Path, help="the folder to write, which gets the folders train and val")
    parser.add_argument("--kind", choices=["nyuv2", "cityscapes", "taskonomy"], default="nyuv2")
    parser.add_argument("--train", type=int, default=32, help="number of samples for training")
    parser.add_argument("--val", type=int, default=8, help="number of samples in val")
    parser.add_argument("--size", type=int, nargs=2, default=[32, 48], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = {"train": options.train, "val": options.val}
    if options.kind == "taskonomy":
        counts["test"] = options.val
        write_taskonomy(options.root, counts, tuple(options.size), options.seed)
    else:
        write(options.root, options.kind, counts, tuple(options.size), options.seed)


if __name__ == "__main__":
    main()
