"""DICOM films: values by closed form, written and read through pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmedpo_utils.errors import InputError
from mmedpo_utils.manifests import open_image

pydicom = pytest.importorskip("pydicom", reason="the extra `dicom` is not installed")
RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)


def save(path: Path, pixels: np.ndarray, **tags: object) -> Path:
    """A minimal secondary capture of ``pixels``; ``tags`` set or replace attributes."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset, bits = Dataset(), 8 * pixels.dtype.itemsize
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, 0
    dataset.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    dataset.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    dataset.save_as(path, enforce_file_format=True)
    return path


def grey(path: Path) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "L"
    return np.asarray(image, dtype=float)


def test_without_a_window_the_own_range_is_scaled(tmp_path: Path) -> None:
    expected = RAMP / RAMP.max() * 255
    assert np.abs(grey(save(tmp_path / "film.dcm", RAMP)) - expected).max() <= 0.5
    turned = grey(save(tmp_path / "turned.dcm", RAMP, PhotometricInterpretation="MONOCHROME1"))
    assert np.abs(turned - (255 - expected)).max() <= 0.5, "MONOCHROME1 is inverted"
    unnamed = save(tmp_path / "film", RAMP)
    assert np.abs(grey(unnamed) - expected).max() <= 0.5, "known by its mark, whatever its name"
    assert grey(save(tmp_path / "flat.dcm", np.full((4, 4), 9, np.uint16))).max() == 0


@pytest.mark.parametrize(("function", "formula"), [
    ("LINEAR", lambda x: np.clip((x - 999.5) / 799 + 0.5, 0, 1)),
    ("LINEAR_EXACT", lambda x: np.clip((x - 1000) / 800 + 0.5, 0, 1)),
    ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 1000) / 800))),
])
def test_values_are_rescaled_then_cut_by_the_window(tmp_path: Path, function: str, formula) -> None:
    path = save(tmp_path / "film.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=[1000, 50],
                WindowWidth=[800, 10], VOILUTFunction=function)
    expected = formula(2.0 * RAMP - 1024) * 255
    assert np.abs(grey(path) - expected).max() <= 0.5 + 1e-6
    assert expected.min() < 5 and expected.max() > 250


def test_colour_is_kept_and_other_forms_are_refused(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = open_image(save(tmp_path / "colour.dcm", colour))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), colour)
    frames = np.zeros((3, 8, 8), np.uint16)
    several = save(tmp_path / "frames.dcm", frames, NumberOfFrames=3, Rows=8, Columns=8, SamplesPerPixel=1,
                   PhotometricInterpretation="MONOCHROME2")
    with pytest.raises(InputError, match=r"frames.dcm: expected one grey frame.*\[3, 8, 8\]"):
        open_image(several)


def test_a_torn_file_and_a_missing_reader_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "film.dcm", RAMP)
    whole = path.read_bytes()
    for content in (whole[: len(whole) - 200], whole[:140], b"not DICOM", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="film.dcm: cannot be decoded as DICOM"):
            open_image(path)
    with pytest.raises(InputError, match="cannot be decoded as DICOM"):
        open_image(tmp_path / "absent.dcm")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(InputError, match=r"film.dcm: DICOM needs pydicom.*mmedpo-notebooks\[dicom\]"):
        open_image(path)
