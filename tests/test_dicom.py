"""DICOM films: values by closed form, written and read through pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image
from mmedpo_utils.convert import dicom

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


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        ("LINEAR", lambda x: np.clip((x - 999.5) / 799 + 0.5, 0, 1)),
        ("LINEAR_EXACT", lambda x: np.clip((x - 1000) / 800 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 1000) / 800))),
    ],
)
def test_values_are_rescaled_then_cut_by_the_window(tmp_path: Path, function: str, formula) -> None:
    path = save(
        tmp_path / "film.dcm",
        RAMP,
        RescaleSlope=2,
        RescaleIntercept=-1024,
        WindowCenter=[1000, 50],
        WindowWidth=[800, 10],
        VOILUTFunction=function,
    )
    expected = formula(2.0 * RAMP - 1024) * 255
    assert np.abs(grey(path) - expected).max() <= 0.5 + 1e-6
    assert expected.min() < 5 and expected.max() > 250


def test_colour_is_kept_and_other_forms_are_refused(tmp_path: Path) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    image = open_image(save(tmp_path / "colour.dcm", colour))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), colour)
    frames = np.zeros((3, 8, 8), np.uint16)
    several = save(
        tmp_path / "frames.dcm",
        frames,
        NumberOfFrames=3,
        Rows=8,
        Columns=8,
        SamplesPerPixel=1,
        PhotometricInterpretation="MONOCHROME2",
    )
    with pytest.raises(InputError, match=r"frames.dcm: expected one grey frame.*\[3, 8, 8\]"):
        open_image(several)


def test_a_torn_file_and_a_missing_reader_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "film.dcm", RAMP)
    whole = path.read_bytes()
    for content in (whole[: len(whole) - 200], whole[:140], b"not DICOM", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="film.dcm: cannot be decoded as DICOM"):
            open_image(path)
    with pytest.raises(InputError, match="cannot be decoded as DICOM"):
        open_image(tmp_path / "absent.dcm")
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(
        InputError, match=r"film.dcm: DICOM needs pydicom.*mmedpo-notebooks\[dicom\]"
    ):
        open_image(path)


def test_a_voi_lut_is_applied_as_pydicom_does(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    from pydicom.sequence import Sequence

    curve = Dataset()
    curve.LUTDescriptor = [4096, 0, 12]
    curve.LUTData = (
        (4095 / (1 + np.exp(-12 * (np.linspace(0, 1, 4096) - 0.7)))).round().astype("<u2").tobytes()
    )
    for tags in (
        {},
        {"WindowCenter": 100, "WindowWidth": 50},
        {"RescaleSlope": 1, "RescaleIntercept": 0},
    ):
        path = save(
            tmp_path / "film.dcm",
            RAMP,
            VOILUTSequence=Sequence([curve]),
            BitsStored=12,
            HighBit=11,
            **tags,
        )
        read = pydicom.dcmread(path)
        theirs = (
            apply_voi_lut(apply_modality_lut(read.pixel_array, read), read, prefer_lut=True)
            / 4095
            * 255
        )
        assert np.abs(grey(path) - theirs).max() <= 0.5
        assert np.abs(grey(path) - RAMP / RAMP.max() * 255).max() > 50, (
            "the curve is far from a line"
        )


def test_a_modality_lut_comes_before_the_window(tmp_path: Path) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], "US"
    table.LUTData = (np.arange(4096)[::-1] * 2).astype("<u2").tobytes()
    path = save(
        tmp_path / "film.dcm",
        RAMP,
        ModalityLUTSequence=Sequence([table]),
        WindowCenter=4000,
        WindowWidth=2000,
    )
    expected = np.clip(((4095.0 - RAMP) * 2 - 3999.5) / 1999 + 0.5, 0, 1) * 255
    assert np.abs(grey(path) - expected).max() <= 0.5 + 1e-6


def test_an_inverse_presentation_inverts(tmp_path: Path) -> None:
    plain = grey(save(tmp_path / "a.dcm", RAMP, PresentationLUTShape="IDENTITY"))
    for tags in ({}, {"PhotometricInterpretation": "MONOCHROME1"}):
        assert np.array_equal(
            grey(save(tmp_path / "b.dcm", RAMP, PresentationLUTShape="INVERSE", **tags)),
            255 - plain,
        )


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_set_the_scale(tmp_path: Path, kind: str) -> None:
    film = RAMP.copy()
    film[:, :2] = 65535
    path = save(
        tmp_path / "film.dcm", film, PixelPaddingValue=65535, PhotometricInterpretation=kind
    )
    inside = RAMP[:, 2:]
    expected = (inside - inside.min()) / np.ptp(inside) * 255
    expected = 255 - expected if kind == "MONOCHROME1" else expected
    assert np.abs(grey(path)[:, 2:] - expected).max() <= 0.5 and grey(path)[:, :2].max() == 0
    film[:, :2] = 65000
    path = save(
        tmp_path / "range.dcm",
        film,
        PixelPaddingValue=65535,
        PixelPaddingRangeLimit=64000,
        PhotometricInterpretation=kind,
    )
    assert np.abs(grey(path)[:, 2:] - expected).max() <= 0.5 and grey(path)[:, :2].max() == 0


def test_signed_values_and_bits_that_are_not_stored(tmp_path: Path) -> None:
    signed = (RAMP.astype(np.int16) - 2048).astype("<i2")
    path = save(
        tmp_path / "signed.dcm", signed, PixelRepresentation=1, WindowCenter=0, WindowWidth=1000
    )
    expected = np.clip((signed + 0.5) / 999 + 0.5, 0, 1) * 255
    assert np.abs(grey(path) - expected).max() <= 0.5 + 1e-6
    twelve = save(tmp_path / "twelve.dcm", RAMP, BitsStored=12, HighBit=11)
    assert np.abs(grey(twelve) - RAMP / RAMP.max() * 255).max() <= 0.5


def float_film(path: Path, values: np.ndarray) -> Path:
    """A film of 32-bit floating-point values, which DICOM keeps under a name of its own."""
    save(path, values.astype("<u4"), BitsAllocated=32)
    dataset = pydicom.dcmread(path)
    del dataset.PixelData, dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit
    dataset.FloatPixelData = values.astype("<f4").tobytes()
    dataset.save_as(path)
    return path


@pytest.mark.parametrize("form", ["DICOM", "TIFF"])
def test_values_that_are_no_numbers_do_not_blacken_a_film(tmp_path: Path, form: str) -> None:
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    path = tmp_path / ("film.dcm" if form == "DICOM" else "film.tiff")
    if form == "DICOM":
        float_film(path, values)
    else:
        Image.fromarray(values).save(path)
    known = RAMP.ravel()[3:].astype(float)
    expected = np.round((known - known.min()) / np.ptp(known) * 255)
    assert np.abs(grey(path).ravel()[3:] - expected).max() <= 0.5
    assert grey(path)[0, :3].tolist() == [0, 255, 0]
    values[:] = np.nan
    float_film(path, values) if form == "DICOM" else Image.fromarray(values).save(path)
    with pytest.raises(InputError, match="film.*holds no finite grey value; fetch the file again"):
        open_image(path)


def lossless(folder: Path) -> Path:
    """RAMP as JPEG Lossless, encoded by GDCM."""
    gdcm = pytest.importorskip("gdcm", reason="the extra `dicom` brings it")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(save(folder / "plain.dcm", RAMP)))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(folder / "lossless.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return folder / "lossless.dcm"


def test_jpeg_lossless_is_decoded(tmp_path: Path) -> None:
    """Encoded by GDCM, read back: every grey value is there."""
    path = lossless(tmp_path)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == pydicom.uid.JPEGLosslessSV1
    assert np.array_equal(grey(path), grey(tmp_path / "plain.dcm"))


def test_a_decoder_that_is_missing_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        raise RuntimeError(
            "Unable to decompress: missing dependencies\n\tgdcm - requires gdcm>=3\n\tpylibjpeg"
        )

    monkeypatch.setattr(pydicom.pixels, "pixel_array", none)
    with pytest.raises(InputError) as refused:
        open_image(save(tmp_path / "film.dcm", RAMP))
    assert "\n" not in str(refused.value) and "pip install 'mmedpo-notebooks[dicom]'" in str(
        refused.value
    )


@pytest.mark.parametrize(("bits", "entries"), [(8, 4096), (8, 256), (10, 1024), (16, 65536)])
def test_a_voi_lut_of_any_depth_is_looked_up_entry_by_entry(
    tmp_path: Path, bits: int, entries: int
) -> None:
    """pydicom reads a table of more than 256 entries of 8 bits wrongly, so this is counted here."""
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    table = np.random.default_rng(bits).integers(0, 2**bits, entries)
    curve = Dataset()
    curve.LUTDescriptor = [entries % 65536, 100, bits]
    curve.LUTData = table.astype("<u2").tobytes()
    path = save(tmp_path / "film.dcm", RAMP, VOILUTSequence=Sequence([curve]))
    places = np.clip(RAMP.astype(int) - 100, 0, entries - 1)
    assert np.abs(grey(path) - table[places] / (2**bits - 1) * 255).max() <= 0.5


def test_a_damaged_film_does_not_end_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some damage makes the decoder abort its process: here it is made to, and the next is read."""
    path = lossless(tmp_path)
    with monkeypatch.context() as crash:
        crash.setattr(dicom, "DECODE", "import os; os.abort()")
        with pytest.raises(InputError, match="film.*its decoder crashed.*remove its row"):
            open_image(path)
    with monkeypatch.context() as hang:
        hang.setattr(dicom, "DECODE", "import time; time.sleep(60)")
        hang.setattr(dicom, "DECODE_SECONDS", 0.2)
        with pytest.raises(InputError, match="did not end in 0.2 seconds"):
            open_image(path)
    assert open_image(path).size == RAMP.shape


def test_nothing_in_the_working_folder_decodes_a_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lossless(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert open_image(path).size == RAMP.shape
