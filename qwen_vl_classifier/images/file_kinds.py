"""Tell by the first bytes of a file which format of picture it is, or in words which other kind of file."""

from __future__ import annotations

import re

KIND_BYTES = 512
"""How many bytes of a file are enough to tell."""

_FORMAT_STARTS = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"})
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes

_STARTS = (
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (b"8BPS", "a Photoshop document"),
    (b"\0\0\x01\0", "a Windows icon"),
    (b"qoif", "a QOI picture"),
    (b"\x76\x2f\x31\x01", "an OpenEXR picture"),
    (b"DDS ", "a DirectDraw texture"),
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"{\\rtf", "an RTF document"),
    (b"\xd0\xcf\x11\xe0", "an old Microsoft Office document"),
    (b"version https://git-lfs", "a Git LFS pointer, whose content was not downloaded (run: git lfs pull)"),
    (b"PK\x03\x04", "a ZIP archive (an Excel or Word file is one too)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x80\x02", "a Python pickle"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x80\x05", "a Python pickle"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"OggS", "an Ogg file of sound or video"),
    (b"ID3", "an MP3 file"),
    (b"fLaC", "a FLAC file"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
)
_BRANDS = {b"crx ": "a camera's raw file (CR3)", b"mif1": "a HEIF picture", b"msf1": "a HEIF picture"}
_RIFF = {b"WAVE": "a WAV file", b"AVI ": "an AVI video"}
_HTML = re.compile(rb"<(!doctype html|html|head|body|script)\b", re.IGNORECASE)
_SVG = re.compile(rb"<svg\b", re.IGNORECASE)


def image_format(start: bytes) -> str | None:
    """Return the format of a picture by its first bytes: a name in `IMAGE_FORMATS`, or `None` for any other file.

    Args:
        start: Its first `KIND_BYTES` bytes, or all of it.
    """
    for magic, name in _FORMAT_STARTS:
        if start.startswith(magic):
            return name
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WebP"
    if start[:2] == b"BM":  # programs have left numbers in bytes that should be zero: then the size of the header tells
        is_bmp = start[6:10] == bytes(4) or int.from_bytes(start[14:18], "little") in _BMP_HEADERS
        return "BMP" if is_bmp else None
    brands = _brands(start)
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIC" if brands & _HEIC_BRANDS else None


def _brands(start: bytes) -> frozenset[bytes]:
    """Return the brands of a file of boxes (ISO/IEC 14496-12), its own first; none for any other file."""
    if start[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(start[:4], "big"), len(start))
    return frozenset({start[8:12], *(start[at : at + 4] for at in range(16, end - 3, 4))})


def file_kind(start: bytes) -> str:
    """Name the kind of a file.

    Args:
        start: Its first `KIND_BYTES` bytes, or all of it.

    Example:
        >>> file_kind(b"<!DOCTYPE html><title>Not found</title>"), file_kind(b"")
        ('an HTML page', 'an empty file')
    """
    if not start:
        return "an empty file"
    if format := image_format(start):
        return f"{'an' if format == 'AVIF' else 'a'} {format} picture"
    for magic, kind in _STARTS:
        if start.startswith(magic):
            return kind
    if start[4:8] == b"ftyp":
        return _BRANDS.get(start[8:12], "an MP4 or QuickTime video")
    if start[:4] == b"RIFF":
        return _RIFF.get(start[8:12], "a RIFF file")
    if start[128:132] == b"DICM":
        return "a DICOM file"
    if start.strip(b"\0") == b"":
        return "a file of zeros, as a broken download leaves it"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _SVG.search(text) and text[:1] == b"<":
        return "an SVG drawing"
    if _HTML.match(text):
        return "an HTML page"
    if text.startswith(b"<?xml") or re.match(rb"<[A-Za-z][\w:.-]*[\s/>]", text):
        return "an XML file"
    if text[:1] in (b"{", b"["):
        return "a JSON text"
    if re.match(rb"P[1-7]\s", text):
        return "a PNM picture"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start):
        return "a text"
    return "a file of another kind"
