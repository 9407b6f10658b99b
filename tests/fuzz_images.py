"""Opens thousands of damaged images: ``python -m tests.fuzz_images SEED COUNT``. Prints what came
out as JSON. A process of its own, so that its memory can be measured.
"""

from __future__ import annotations

import io
import json
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from mmedpo_utils.base.errors import InputError
from mmedpo_utils.base.images import open_image

SIDE = 48
LONGEST_SECONDS = 20
# Format, mode, and how it is saved.
WRITTEN = [
    ("PNG", "L", {}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("PNG", "1", {}),
    ("PNG", "I;16", {}),
    ("PNG", "LA", {}),
    ("JPEG", "L", {}),
    ("JPEG", "RGB", {}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "L", {"exif": "upright"}),
    ("TIFF", "L", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "F", {}),
    ("TIFF", "I;16", {}),
    ("TIFF", "L", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "L", {"compression": "packbits"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("BMP", "L", {}),
    ("BMP", "RGB", {}),
    ("BMP", "1", {}),
    ("GIF", "L", {}),
    ("GIF", "RGB", {"save_all": True, "append_images": "twice"}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("PPM", "L", {}),
    ("PPM", "RGB", {}),
    ("PPM", "1", {}),
    ("JPEG2000", "L", {}),
    ("JPEG2000", "RGB", {"irreversible": True}),
    # Formats that are not read: whatever they hold, they end in an InputError.
    ("EPS", "L", {}),
    ("ICO", "RGBA", {}),
    ("TGA", "RGB", {}),
    ("PCX", "L", {}),
    ("SGI", "L", {}),
    ("DDS", "RGB", {}),
    ("PDF", "L", {}),
    ("XBM", "1", {}),
    ("IM", "L", {}),
    ("MPO", "RGB", {}),
]


def seeds() -> list[tuple[str, bytes]]:
    """Whole images, by the ending of their file."""
    values = np.random.default_rng(0)
    grey = values.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    grey[8:24, 8:40] = 90  # something that compresses
    found = []
    for kind, mode, options in WRITTEN:
        if mode == "I;16":
            image = Image.fromarray(grey.astype(np.uint16) * 200)
        elif mode == "CMYK":
            image = Image.fromarray(grey).convert("RGB").convert("CMYK")
        else:
            image = Image.fromarray(grey).convert(mode)
        settings = dict(options)
        if "exif" in settings:
            exif = Image.Exif()
            exif[0x0112] = 6
            settings["exif"] = exif.tobytes()
        if "append_images" in settings:
            settings["append_images"] = [image]
        stream = io.BytesIO()
        image.save(stream, format=kind, **settings)
        found.append((".png", stream.getvalue()))
    return found + dicoms(grey)


def dicoms(grey: np.ndarray) -> list[tuple[str, bytes]]:
    """DICOM files of four transfer syntaxes, two of them compressed."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import (
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        JPEGBaseline8Bit,
        RLELossless,
    )

    found = []
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEGBaseline8Bit):
        bits = 8 if syntax == JPEGBaseline8Bit else 16
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = syntax
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
        meta.MediaStorageSOPInstanceUID = "1.2.3"
        film = FileDataset("film", {}, file_meta=meta, preamble=b"\0" * 128)
        film.SOPClassUID = meta.MediaStorageSOPClassUID
        film.SOPInstanceUID = "1.2.3"
        film.Rows, film.Columns = grey.shape
        film.SamplesPerPixel = 1
        film.PhotometricInterpretation = "MONOCHROME2"
        film.BitsAllocated = film.BitsStored = bits
        film.HighBit = bits - 1
        film.PixelRepresentation = 0
        film.WindowCenter, film.WindowWidth = 128, 256
        if syntax == RLELossless:
            film.compress(syntax, grey.astype("<u2"))
        elif syntax == JPEGBaseline8Bit:
            stream = io.BytesIO()
            Image.fromarray(grey).save(stream, format="JPEG")
            film.PixelData = encapsulate([stream.getvalue()])
        else:
            film.PixelData = grey.astype("<u2").tobytes()
        stream = io.BytesIO()
        film.save_as(stream, enforce_file_format=True)
        found.append((".dcm", stream.getvalue()))
    return found


def damaged(content: bytes, chance: random.Random) -> bytes:
    """An image with one to eight damages: bytes that were changed, cut, filled, copied or put
    elsewhere.
    """
    made = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        # Heads decide most, and are short.
        end = min(len(made), 200) if chance.random() < 0.6 else len(made)
        place = chance.randrange(max(1, end))
        length = chance.choice((1, 1, 2, 4, 16, 64))
        way = chance.randrange(6)
        if way == 0:
            made[place : place + 1] = bytes([chance.randrange(256)])
        elif way == 1:
            made[place : place + length] = b"\xff" * length
        elif way == 2:
            made[place : place + length] = b"\0" * length
        elif way == 3:
            del made[place : place + length]
        elif way == 4:
            made[place:place] = made[:length]
        else:
            del made[chance.randrange(len(made) or 1) :]
        if not made:
            break
    return bytes(made)


def too_long(*_: object) -> None:
    raise TimeoutError("took too long")


def main() -> None:
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(seed)
    whole = seeds()
    signal.signal(signal.SIGALRM, too_long)
    outcomes: Counter[str] = Counter()
    wrong = []
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            ending, content = whole[number % len(whole)]
            if number >= len(whole):
                content = damaged(content, chance)
            file = Path(folder) / f"film{ending}"
            file.write_bytes(content)
            signal.alarm(LONGEST_SECONDS)
            try:
                image = open_image(file)
                assert image.mode in ("L", "RGB"), image.mode
                outcomes["opened"] += 1
            except InputError as error:
                outcomes["InputError"] += 1
                if str(file) not in str(error) or "\n" in str(error):
                    wrong.append([number, "a message without its file", str(error)[:200]])
            except BaseException as error:
                outcomes[type(error).__name__] += 1
                wrong.append([number, type(error).__name__, str(error)[:200]])
            finally:
                signal.alarm(0)
    # Not getrusage's: that one begins with what the parent process had.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    told = {"seeds": len(whole), "outcomes": outcomes, "wrong": wrong, "peak_gib": peak}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
