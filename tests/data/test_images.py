"""Images of every mode and orientation: known pixel values, or an error that names the file."""

import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import mtl
from mtl.data.images import FORMATS, Images, Transform, open_image

PLAIN: dict[str, Any] = {"mean": [0, 0, 0], "std": [1, 1, 1]}


def seen(path: Path, size: tuple[int, int] = (2, 3)) -> np.ndarray:
    """Returns the field image of an image, (height, width, 3) in 0 … 1."""
    return np.moveaxis(Images([str(path)], {}, Transform(size, **PLAIN))[0]["image"].numpy(), 0, -1)


GREY = np.array([[0, 257, 1000], [4095, 30000, 65535]], dtype=np.uint16)
COLOURS = np.array([[[0, 10, 20], [255, 0, 3], [7, 7, 7]], [[1, 2, 3], [90, 80, 70], [255, 255, 255]]], dtype=np.uint8)


def write_pgm(path: Path, pixels: np.ndarray, most: int) -> None:
    path.write_bytes(f"P5 {pixels.shape[1]} {pixels.shape[0]} {most}\n".encode() + pixels.astype(">u2").tobytes())


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_grey_of_16_bits_is_scaled_by_its_own_range(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("pgm"):
        write_pgm(path, GREY, 65535)
    else:
        Image.fromarray(GREY).save(path)
    image = seen(path)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, np.repeat(GREY[..., None] / 65535, 3, axis=2), atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_may_be_white_where_it_is_zero(tmp_path: Path, bits: int) -> None:
    grey = GREY if bits == 16 else (GREY // 257).astype(np.uint8)
    data, (height, width) = grey.astype("<u2" if bits == 16 else "u1").tobytes(), grey.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 0, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    start = struct.pack("<I", 8 + len(data))
    (tmp_path / "a.tif").write_bytes(b"II*\0" + start + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    right = 1 - grey / (2**bits - 1)
    np.testing.assert_allclose(seen(tmp_path / "a.tif"), np.repeat(right[..., None], 3, axis=2), atol=1e-6)


def test_differences_of_16_bits_are_not_rounded_to_8(tmp_path: Path) -> None:
    fine = np.arange(1000, 1006, dtype=np.uint16).reshape(2, 3)
    Image.fromarray(fine).save(tmp_path / "fine.png")
    assert len(np.unique(seen(tmp_path / "fine.png"))) == 6


def test_grey_of_16_bits_is_resized_standardised_and_augmented(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (20, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    Image.fromarray(np.repeat((ramp / 257).round().astype(np.uint8)[..., None], 3, axis=2)).save(tmp_path / "eight.png")
    for augment in (False, True):
        torch.manual_seed(0)
        transform = Transform(8, augment=augment)
        (sixteen,) = [transform(open_image(tmp_path / "ramp.png"))]
        torch.manual_seed(0)
        eight = transform(open_image(tmp_path / "eight.png"))
        assert sixteen.shape == (3, 8, 8)
        torch.testing.assert_close(sixteen, eight, atol=0.02, rtol=0)  # a step of 8 bits is 0.017 here


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LA", "RGBA", "PA"])
def test_modes_of_8_bits(tmp_path: Path, mode: str) -> None:
    """Known colours; an alpha channel that is opaque everywhere says nothing."""
    path = tmp_path / ("a.tif" if mode in ("CMYK", "PA") else "a.png")
    grey = COLOURS[..., 0]
    if mode in ("RGB", "RGBA", "P", "CMYK"):
        expected = COLOURS
        picture = Image.fromarray(COLOURS).convert(mode) if mode != "P" else Image.fromarray(COLOURS).quantize(6)
    elif mode == "1":
        expected = np.repeat(np.where(grey > 127, 255, 0)[..., None], 3, axis=2)
        picture = Image.fromarray(grey > 127)
    else:
        expected = np.repeat(grey[..., None], 3, axis=2)
        picture = Image.fromarray(grey).convert(mode)
    try:
        picture.save(path)
    except OSError:
        pytest.skip(f"Pillow writes no file of the mode {mode}")
    np.testing.assert_allclose(seen(path) * 255, expected, atol=1 if mode == "P" else 1e-4)


def transparent(mode: str, path: Path) -> None:
    alpha = np.full((2, 3), 255, dtype=np.uint8)
    alpha[0, 1] = 128
    if mode == "RGBA":
        Image.fromarray(np.dstack([COLOURS, alpha])).save(path)
    elif mode == "LA":
        Image.fromarray(np.dstack([COLOURS[..., 0], alpha]), mode="LA").save(path)
    elif mode == "P":
        Image.fromarray(COLOURS).quantize(6).save(path, transparency=0)
    elif mode == "P with alphas":
        Image.fromarray(COLOURS).quantize(6).save(path, transparency=bytes([255, 0, 255, 255, 255, 255]))
    elif mode == "L":
        Image.fromarray(COLOURS[..., 0]).save(path, transparency=7)
    elif mode == "RGB":
        Image.fromarray(COLOURS).save(path, transparency=(7, 7, 7))
    else:
        Image.fromarray(GREY).save(path, transparency=1000)


@pytest.mark.filterwarnings("ignore:.*mode:DeprecationWarning")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P with alphas", "L", "RGB", "I;16"])
def test_transparent_pixels_are_refused(tmp_path: Path, mode: str) -> None:
    transparent(mode, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        if mode == "I;16" and "transparency" not in image.info:
            pytest.skip("Pillow doesn't write it")
    with pytest.raises(mtl.UserError, match=r"the picture .*a\.png has transparent pixels, whose colours aren't known"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_ranges_that_are_not_known_are_refused(tmp_path: Path, mode: str) -> None:
    if mode == "LAB":
        picture = Image.new("LAB", (3, 2))
    else:
        picture = Image.fromarray(GREY.astype({"F": np.float32, "I": np.int32}[mode]))
    picture.save(tmp_path / "a.tif")
    with pytest.raises(mtl.UserError, match=rf"a\.tif has pixels of Pillow's mode {mode}, whose range isn't known"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, name: str, orientation: int) -> None:
    """The right picture has a bright corner at the top left, and is wider than high."""
    upright = np.full((16, 32, 3), 40, dtype=np.uint8)
    upright[:8, :16] = 220
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # PIL.Image.Transpose that EXIF takes back
    stored = Image.fromarray(upright) if undo is None else Image.fromarray(upright).transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, **({"quality": 100} if name.endswith("jpg") else {}))
    with Image.open(tmp_path / name) as file:
        np.testing.assert_allclose(np.asarray(ImageOps.exif_transpose(file).convert("RGB")), upright, atol=4)
    np.testing.assert_allclose(seen(tmp_path / name, (16, 32)) * 255, upright, atol=4)
    np.testing.assert_allclose(np.asarray(open_image(tmp_path / name, mode=None)), upright, atol=4)  # masks too


def test_a_masks_numbers_stay(tmp_path: Path) -> None:
    numbers = np.array([[0, 1, 2], [3, 255, 7]], dtype=np.uint8)
    Image.fromarray(numbers).save(tmp_path / "mask.png")
    assert np.asarray(open_image(tmp_path / "mask.png", mode=None)).tolist() == numbers.tolist()
    Image.fromarray(GREY).save(tmp_path / "wide.png")
    assert np.asarray(open_image(tmp_path / "wide.png", mode=None)).tolist() == GREY.tolist()


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(mtl.UserError, match=r"the picture .*a\.png is damaged"):
        open_image(tmp_path / "a.png")
    with pytest.raises(mtl.UserError, match=r"there is no picture .*b\.png"):
        open_image(tmp_path / "b.png")


def saved_in_every_format(folder: Path) -> dict[str, Path]:
    """Saves an image in each format that Pillow can both write and read."""
    Image.init()
    found = {}
    for name in sorted(set(Image.SAVE) & set(Image.OPEN)):
        path = folder / f"picture.{name.lower()}"
        for mode in ("RGB", "L", "1", "F"):
            try:
                Image.fromarray(np.full((16, 16), 200, np.uint8)).convert(mode).save(path, name)
                with Image.open(path, formats=[name]) as picture:
                    picture.verify()
                found[name] = path
                break
            except Exception:  # this one needs another mode, or a library that isn't there
                path.unlink(missing_ok=True)
    return found


def test_pictures_of_other_formats_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file is called; for some of them Pillow would start another program."""
    (tmp_path / "bin").mkdir()
    for program in ("gs", "ghostscript", "xv", "magick"):
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/canary\n")
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # or it isn't looked for again
    files = saved_in_every_format(tmp_path)
    plain = {"BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF"}
    assert plain | {"EPS", "IM", "SPIDER"} <= set(files)
    with Image.open(files["EPS"]) as picture, suppress(OSError):
        picture.load()
    assert (tmp_path / "canary").exists()  # so the refusal below is what keeps it away
    (tmp_path / "canary").unlink()
    for name, path in files.items():
        for renamed in (path, path.rename(tmp_path / f"{name}.png")):
            if not renamed.exists():
                continue
            if name in plain:
                assert open_image(renamed).size == (16, 16), name
            elif name not in FORMATS:
                with pytest.raises(mtl.UserError, match=rf"the picture {renamed} is damaged: UnidentifiedImageError"):
                    open_image(renamed)
    assert not (tmp_path / "canary").exists()
    risky = {"EPS", "WMF", "FITS", "PDF", "PSD", "FPX", "MIC", "MPEG", "BUFR", "GRIB", "HDF5", "ICNS"}
    assert not risky & set(FORMATS)
