"""Pictures of every kind become RGB tensors; broken ones are named; batches come whole and in order."""

import io
import logging
import os
import re
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

from patchnetvlad import images
from patchnetvlad.errors import UserError
from patchnetvlad.images import (
    ImageDataset,
    check_images,
    image_batches,
    prepare_image,
    read_image,
    require_readable,
    tell_stretched_files,
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(picture: Image.Image, path: Path, **options: object) -> Path:
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("height_and_width", [(48, 64), (99, 31), (7, 300), (0, 64), (48, -1)])
def test_prepared_as_torchvision_does_bit_for_bit(height_and_width: tuple[int, int]) -> None:
    height, width = height_and_width
    picture = noise(83, 61)
    steps = [
        transforms.ToTensor(),
        transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
    if min(height, width) > 0:
        steps.insert(0, transforms.Resize((height, width)))
    tensor = prepare_image(picture, height, width)
    assert torch.equal(tensor, transforms.Compose(steps)(picture))
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()


def test_known_pixels() -> None:
    tensor = prepare_image(Image.new("RGB", (4, 3), (255, 0, 51)), 0, 0)
    assert tensor.shape == (3, 3, 4)
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(tensor, expected[:, None, None].expand(3, 3, 4))


def test_colour_kinds(tmp_path: Path) -> None:
    colour = (200, 100, 50)
    flat = Image.new("RGB", (8, 6), colour)
    transparent = flat.convert("RGBA")
    transparent.putalpha(0)
    files = {
        "rgb.png": flat,
        "rgba.png": transparent,
        "palette.png": flat.quantize(4),
        "palette.gif": flat.quantize(4),
        "cmyk.tif": flat.convert("CMYK"),
        "rgb.bmp": flat,
        "rgb.webp": transparent,
        "rgb.ppm": flat,
    }
    for name, picture in files.items():
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        rgb = read_image(save(picture, tmp_path / name, **options))
        assert (rgb.mode, rgb.size) == ("RGB", (8, 6)), name
        assert rgb.getpixel((3, 3)) == colour, name
    jpeg = read_image(save(flat.convert("CMYK"), tmp_path / "cmyk.jpg", quality=100))
    assert np.abs(np.subtract(jpeg.getpixel((3, 3)), colour)).max() <= 3


def test_palette_with_transparent_entries(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    path = save(picture, tmp_path / "palette.png", transparency=bytes([0, 128]))
    assert read_image(path).getpixel((0, 0)) == (10, 20, 30)  # Pillow would warn


def test_grey_kinds(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(ramp)
    full = Image.fromarray(ramp.astype(np.uint16) * 257)
    files = {"8.png": grey, "8.pgm": grey, "la.png": grey.convert("LA"), "16.png": full, "16.tif": full}
    for name, picture in files.items():
        rgb = np.asarray(read_image(save(picture, tmp_path / name)))
        assert (rgb == ramp[:, :, None]).all(), name
    (tmp_path / "16.pgm").write_bytes(b"P5 16 16 65535\n" + (ramp.astype(">u2") * 257).tobytes())
    assert (np.asarray(read_image(tmp_path / "16.pgm")) == ramp[:, :, None]).all()
    bits = read_image(save(Image.fromarray(ramp > 100), tmp_path / "1.png"))
    assert (np.asarray(bits) == np.where(ramp > 100, 255, 0)[:, :, None]).all()


def test_sixteen_bits_are_rounded(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 65406, 65407, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / "16.png")
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(noise(6, 4), tmp_path / "turned.png", exif=exif)
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
    assert np.array_equal(read_image(path), noise(6, 4))
    assert np.array_equal(read_image(path, exif_rotation=True), upright)
    ((indices, batch),) = image_batches([path], 0, 0, 1, 0, exif_rotation=True)
    assert indices == [0]
    assert batch.shape[2:] == upright.size[::-1]


def test_broken_exif_leaves_the_picture_as_stored(tmp_path: Path) -> None:
    for name, exif in {"text": b"Exif\0\0no such header", "cut": b"Exif\0\0II*\0\x08\0\0\0\x01\0"}.items():
        path = save(noise(6, 4), tmp_path / f"{name}.jpg", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of the EXIF
            assert read_image(path, exif_rotation=True).size == (6, 4)


def broken_files(folder: Path) -> dict[Path, str]:
    """Unreadable files and what is to be said of them."""
    picture = noise(200, 150)
    problems = {}
    for extension in ("jpg", "png", "webp", "bmp", "tif"):
        buffer = io.BytesIO()
        picture.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(extension, extension))
        path = folder / f"truncated.{extension}"
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) * 9 // 10])
        problems[path] = "" if extension in ("webp", "tif") else "cannot be decoded"
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "folder.jpg").mkdir()
    save(Image.new("F", (5, 5)), folder / "float.tif")
    return problems | {
        folder / "empty.jpg": "empty file (0 bytes)",
        folder / "page.jpg": "not a picture",
        folder / "folder.jpg": "a folder",
        folder / "missing.jpg": "no such file",
        folder / "float.tif": "floating-point",
    }


def test_broken_files_are_named_in_order(tmp_path: Path) -> None:
    problems = broken_files(tmp_path)
    good = save(noise(20, 10), tmp_path / "good.jpg")
    paths = [good, *problems, good]
    for workers in (0, 1, 8):
        found = check_images(paths, workers)
        assert list(found) == list(problems)
        lines = list(found.values())
        for line, (path, problem) in zip(lines, problems.items(), strict=True):
            assert line.startswith(f"{path}: ")
            assert problem in line
            assert "\n" not in line
    for path in problems:
        with pytest.raises(UserError) as caught:
            read_image(path)
        assert str(caught.value) in lines


def test_whole_files_pass(tmp_path: Path) -> None:
    paths = [
        save(noise(width, 3), tmp_path / f"{width}.{extension}")
        for width in (1, 5, 30)
        for extension in ("jpg", "png", "tiff", "webp")
    ]
    paths.append(save(noise(70, 50).convert("L"), tmp_path / "grey.jpg"))
    paths.append(save(noise(70, 50).convert("CMYK"), tmp_path / "cmyk.jpg", progressive=True))
    assert check_images(paths) == {}


def test_huge_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(noise(20, 10), tmp_path / "huge.png")
    for limit in (199, 99):  # Pillow warns up to twice its limit, and raises beyond
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert check_images([path]) == {path: f"{path}: more than {limit} pixels (make it smaller)"}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert check_images([path]) == {}


def test_warning_filters_stay_as_they_were(tmp_path: Path) -> None:
    paths = [save(noise(9, 9, seed), tmp_path / f"{seed}.png") for seed in range(20)]
    before = list(warnings.filters)
    check_images(paths, workers=8)
    assert warnings.filters == before


def test_one_error_for_a_list(tmp_path: Path) -> None:
    good = save(noise(9, 9), tmp_path / "good.png")
    names = ("good.png", *(f"missing{number}.jpg" for number in range(12)))
    paths, source = [tmp_path / name for name in names], tmp_path / "list.txt"
    with pytest.raises(UserError) as caught:
        require_readable(paths, source)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'list.txt'}: 12 of 13 pictures cannot be read: ")
    assert message.count("no such file") == 10
    assert message.endswith("missing9.jpg: no such file; and 2 more")
    require_readable([good], source)
    with pytest.raises(UserError, match="is the dataset's root folder right"):
        require_readable(paths[1:2], source)


def counted_decoding(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pictures that are decoded from now on."""
    decoded: list[Path] = []
    decode = images._problem

    def counted(path: Path) -> str | None:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(images, "_problem", counted)
    return decoded


def test_a_check_is_remembered_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(noise(9, 9, seed), tmp_path / f"{seed}.bmp") for seed in range(6)]
    broken = tmp_path / "broken.bmp"
    broken.write_bytes(paths[0].read_bytes()[:100])
    decoded = counted_decoding(monkeypatch)
    assert list(check_images([*paths, broken])) == [broken]
    assert sorted(decoded) == sorted([*paths, broken])
    decoded.clear()
    assert list(check_images([*paths, broken])) == [broken]  # what was broken is looked at again
    assert decoded == [broken]
    decoded.clear()
    times = paths[1].stat().st_atime_ns, paths[1].stat().st_mtime_ns
    paths[1].write_bytes(paths[1].read_bytes()[:100])  # another size, at the same time
    os.utime(paths[1], ns=times)
    paths[2].write_bytes(b"\0" * paths[2].stat().st_size)  # the same size, at another time
    os.utime(paths[2], ns=(0, 10**9))
    paths[3].unlink()
    broken.write_bytes(paths[0].read_bytes())
    assert list(check_images([*paths, broken])) == paths[1:4]
    assert decoded == [*paths[1:4], broken]
    decoded.clear()
    monkeypatch.chdir(tmp_path)
    assert check_images([Path("0.bmp"), Path("broken.bmp")]) == {} and not decoded  # known by the absolute name


def test_an_interrupted_check_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(noise(9, 9, seed), tmp_path / f"{seed}.png") for seed in range(6)]
    decode = images._problem

    def interrupted(path: Path) -> str | None:
        if path == paths[3]:
            raise KeyboardInterrupt
        return decode(path)

    with monkeypatch.context() as patch:
        patch.setattr(images, "_problem", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check_images(paths, workers=1)
    decoded = counted_decoding(monkeypatch)
    assert check_images(paths) == {} and decoded == paths[3:]


@pytest.mark.parametrize("damage", ["no database", "a folder", "no home"])
def test_a_memory_that_cannot_be_used_changes_nothing(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    memory = tmp_path / "cache/checked_pictures.sqlite"
    monkeypatch.setattr(images, "user_cache", homeless if damage == "no home" else lambda: memory.parent)
    memory.parent.mkdir()
    if damage == "a folder":
        memory.mkdir()
    if damage == "no database":
        memory.write_text("no database " * 100)
    path = save(noise(9, 9), tmp_path / "a.png")
    decoded = counted_decoding(monkeypatch)
    for _ in range(2):
        assert check_images([path]) == {}
    assert decoded == ([path] if damage == "no database" else [path, path])


def test_a_long_check_says_how_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    paths = [save(noise(4, 4, seed), tmp_path / f"{seed}.bmp") for seed in range(120)]
    check_images(paths[:100], workers=2)
    assert not caplog.text
    further = [save(noise(4, 4, seed), tmp_path / f"more{seed}.bmp") for seed in range(101)]
    check_images([*paths[10:], *further], workers=2)
    message = r"checking 121 pictures with 2 threads: about \d+\.\d s \(90 more were found whole before\)"
    assert re.search(message, caplog.text)


def test_progress_bar_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [save(noise(9, 9), tmp_path / f"{name}.png") for name in "ab"]
    check_images(paths[:1])
    assert capsys.readouterr().err == ""
    check_images(paths[1:], progress=True)
    assert "Checking pictures" in capsys.readouterr().err


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Seven pictures of three sizes: A B A C B A A."""
    sizes = {"A": (20, 10), "B": (10, 20), "C": (12, 12)}
    return [save(noise(*sizes[kind], seed=number), tmp_path / f"{number}.png") for number, kind in enumerate("ABACBAA")]


@pytest.mark.parametrize("threads", [0, 1, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_batches_of_one_given_size(pictures: list[Path], threads: int, batch_size: int) -> None:
    dataset = ImageDataset(pictures, 16, 24)
    seen = []
    for indices, batch in image_batches(pictures, 16, 24, batch_size, threads):
        assert batch.shape == (len(indices), 3, 16, 24)
        assert torch.equal(batch, torch.stack([dataset[index][1] for index in indices]))
        seen.append(indices)
    flat = list(range(7))
    assert seen == [flat[start : start + batch_size] for start in range(0, 7, batch_size)]


@pytest.mark.parametrize("threads", [0, 3])
def test_batches_of_own_sizes(pictures: list[Path], threads: int) -> None:
    batches = list(image_batches(pictures, 0, 0, 2, threads))
    assert [indices for indices, _ in batches] == [[0, 2], [1, 4], [3], [5, 6]]
    assert [tuple(batch.shape[2:]) for _, batch in batches] == [(10, 20), (20, 10), (12, 12), (10, 20)]
    for indices, batch in batches:
        assert torch.equal(batch[-1], prepare_image(read_image(pictures[indices[-1]]), 0, 0))


@pytest.mark.parametrize("size", [0, 16])
def test_some_indices_and_none(pictures: list[Path], size: int) -> None:
    assert [i for i, _ in image_batches(pictures, size, size, 2, 2, indices=[6, 0, 3])] == ([[6, 0], [3]])
    assert list(image_batches(pictures, size, size, 2, 2, indices=[])) == []
    assert list(image_batches([], size, size, 2)) == []


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("size", [0, 16])
def test_unreadable_picture_in_a_batch(pictures: list[Path], threads: int, size: int) -> None:
    pictures[5].write_bytes(pictures[5].read_bytes()[:60])
    with pytest.raises(UserError, match=r"5\.png: cannot be decoded"):
        list(image_batches(pictures, size, size, 2, threads))


def test_loading_runs_ahead_but_not_away(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = threading.Semaphore(0)
    many = pictures * 10

    def counted(path: Path, exif_rotation: bool) -> Image.Image:
        loaded.release()
        return read_image(path, exif_rotation)

    monkeypatch.setattr(images, "read_image", counted)
    batches = image_batches(many, 8, 8, 2, threads=2)
    next(batches)
    for _ in range(8):  # this batch and the three ahead, while the caller computes
        assert loaded.acquire(timeout=10)
    assert not loaded.acquire(timeout=0.05)
    threads = threading.active_count()
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() < threads


def test_dataset(pictures: list[Path]) -> None:
    dataset = ImageDataset(pictures, 6, 5)
    index, tensor = dataset[3]
    assert (len(dataset), index, tensor.shape) == (7, 3, (3, 6, 5))
    with pytest.raises(UserError, match="no such file"):
        ImageDataset([Path("missing.jpg")], 6, 5)[0]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_come_in_order_and_few_are_computed_ahead(threads: int) -> None:
    begun: list[int] = []

    def slowly(number: int) -> int:
        begun.append(number)
        time.sleep(0.002 * (number % 3))
        return number * number

    results = images.in_order(slowly, iter(range(40)), threads, ahead=5)
    for number in range(40):
        assert next(results) == number * number
        assert len(begun) <= number + 1 + (5 if threads else 0)
    assert list(results) == []


def test_pictures_that_resizing_stretches_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"a.png": (64, 48), "b.png": (48, 64), "c.png": (65, 48), "d.png": (640, 479), "e.png": (64, 64)}
    paths = []
    for name, size in sizes.items():
        paths.append(tmp_path / name)
        Image.new("RGB", size).save(paths[-1])

    def told(paths: list[Path], height: int, exif_rotation: bool = False) -> list[str]:
        caplog.clear()
        tell_stretched_files(paths, height, 640, exif_rotation)
        return [record.message.partition(" of other")[0] for record in caplog.records]

    caplog.set_level(logging.INFO)
    assert told([*paths, paths[1]], 480) == ["3 of 5 pictures"]
    assert told(paths, 0) == told([paths[0]], 480) == []
    monkeypatch.setattr(images, "_LOOKED_AT", 2)
    assert told(paths[::-1], 480) == ["2 of 2 pictures"]  # e and b
    monkeypatch.undo()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (48, 64)).save(tmp_path / "f.jpg", exif=turned)
    assert told([tmp_path / "f.jpg"], 480, exif_rotation=True) == []
    assert told([tmp_path / "f.jpg"], 480) == ["1 of 1 picture"]
