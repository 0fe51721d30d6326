"""Uploads of untrusted clients: image and adapter name of a request, each checked before it costs memory or time.

Pillow and Starlette are imported where they are used; the extra ``serve`` installs both.
"""

import io
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from ..preparation import to_rgb

Room = Callable[[int], Awaitable[None]]  # waits until this many more bytes may be held
_FORMATS = ("JPEG", "PNG", "WEBP")  # including MPO, a JPEG followed by further pictures, which phones make
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_RAW = "", "application/octet-stream", "application/x-www-form-urlencoded"  # the last: curl --data-binary
# limit of longer / shorter side: transforms resize the shorter one to the model's size, and the longer in proportion
_ASPECT = 100
# limit of the scans in a progressive JPEG: encoders write about ten, and a decoder visits all pixels in each
_SCANS = 64
# a marker of JPEG in compressed data, where a byte 255 is followed by 0, and restarts are part of a scan
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)


FIELDS = "adapter", "top"  # of a request, beside the image


class Refused(Exception):
    """A request is answered with this ``status`` and sentence. With a 4xx status it would be refused again."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Upload:
    """The bytes of an image, the adapter to classify it with (None for no adapter), and the number of scores wanted."""

    image: bytes
    adapter: str | None
    top: int


def check_adapter_name(name: str | None) -> str | None:
    """The name, or None for an empty one.

    Raises:
        Refused: 400 for a name that could be a path.
    """
    if not name:
        return None
    if not ADAPTER_NAME.fullmatch(name):
        raise Refused(400, f"adapter must be letters, digits, '_', '-' and '.', at most 100, got {name[:120]!r}")
    return name


def check_fields(given: Iterable[str], known: tuple[str, ...] = FIELDS) -> None:
    """Raise Refused, 400, for a parameter of a request that is none of those that are known, or is given twice."""
    given = [*given]
    if unknown := [name for name in given if name not in known]:
        raise Refused(400, f"parameters must be {' or '.join(known) or 'left out'}, got {unknown[0][:80]!r}")
    if twice := [name for name in known if given.count(name) > 1]:
        raise Refused(400, f"parameters must be given once, got {twice[0]!r} more than once")


async def read_upload(request, *, max_bytes: int, room: Room | None = None) -> Upload:
    """Read the upload of a Starlette request. ``room(n)`` is awaited for each ``n`` bytes that have arrived.

    The body is either the image itself or multipart/form-data with a file ``image``. ``adapter`` and ``top`` (number of
    scores, default 5) are query parameters or fields of the form.

    Raises:
        Refused: 400 for a declared length that is not a number, a form that cannot be read or has no image, an empty
            image, another parameter or field, one that is given twice, a bad adapter name or ``top``; 413 for more than
            max_bytes; 415 for another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not form and kind not in _RAW and not kind.startswith("image/"):
        known = "image/*, application/octet-stream or multipart/form-data"
        raise Refused(415, f"content-type must be {known}, got {kind[:80]!r}")
    fields = request.query_params.multi_items()
    check_fields(name for name, _ in fields)
    # room for the form's fields and separators
    body = await _body(request, max_bytes + 4096 * form, room)
    if form:
        image, more = await _form(request, body)
        fields += more
    else:
        image = body
    check_fields(name for name, _ in fields)
    fields = dict(fields)
    if not image:
        raise Refused(400, "image must not be empty")
    if len(image) > max_bytes:
        raise Refused(413, f"image must have at most {max_bytes} bytes, got {len(image)}")
    top = fields.get("top", "5")
    if not (re.fullmatch("[0-9]{1,6}", top) and 1 <= int(top) <= 100_000):
        raise Refused(400, f"top must be a number from 1 to 100000, got {top[:20]!r}")
    return Upload(image, check_adapter_name(fields.get("adapter")), int(top))


async def _body(request, max_bytes: int, room: Room | None) -> bytes:
    declared = request.headers.get("content-length")
    if declared is not None:
        if not (declared.isascii() and declared.isdigit()):
            raise Refused(400, f"content-length must be a number, got {declared[:20]!r}")
        if len(declared) > 15 or int(declared) > max_bytes:
            raise Refused(413, f"the body must have at most {max_bytes} bytes, got {declared[:20]}")
    chunks, total = [], 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > max_bytes:  # the declared length was missing or wrong
            raise Refused(413, f"the body must have at most {max_bytes} bytes")
        if room:
            await room(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


async def _form(request, body: bytes) -> tuple[bytes, list[tuple[str, str]]]:
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def stream():
        yield body

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=4, max_part_size=1024).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused(400, f"the form cannot be read: {getattr(error, 'message', error)}") from error
    try:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise Refused(400, "the form must have a file 'image'")
        return await image.read(), [(key, value) for key, value in form.multi_items() if isinstance(value, str)]
    finally:
        await form.close()


def _scans(data: bytes) -> int:
    """The number of scans of the first picture of a JPEG file, from its markers up to the end of that picture.

    What follows it is not decoded: further pictures, or the video that phones append.
    """
    count, at = 0, 2  # after the start of the picture
    while found := _MARKER.search(data, at):
        marker, at = found[0][1], found.end()
        if marker == 0xD9:  # the end of the picture
            break
        if marker in (0x01, 0xD8):  # without a length
            continue
        count += marker == 0xDA
        at += max(2, int.from_bytes(data[at : at + 2], "big"))  # the segment, which may hold bytes like markers
    return count


def decode(data: bytes, *, max_pixels: int):
    """Decode a JPEG, PNG or WebP file to a PIL image of mode RGB, with its EXIF orientation applied.

    The size is read from the header and checked before anything is decoded. Palettes, CMYK, 8-bit and 16-bit greyscale
    are converted to RGB; transparent parts become white.

    Raises:
        Refused: 413 for more than max_pixels; 415 for another format; 422 for an animation, an extreme aspect ratio,
            too many JPEG scans, or a truncated or corrupt file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise Refused(415, f"image must be a complete {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file") from error
    except Image.DecompressionBombError as error:
        raise Refused(413, f"image must have at most {max_pixels} pixels: {error}") from error
    except Exception as error:  # decoders raise errors of any type
        raise Refused(422, f"image cannot be read: {error}") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise Refused(413, f"image must have at most {max_pixels} pixels, got {width} x {height}")
        if max(width, height) > _ASPECT * min(width, height):
            raise Refused(422, f"image must be at most {_ASPECT} times as long as it is wide, got {width} x {height}")
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise Refused(422, f"image must be one picture, got an animation of {image.n_frames}")
        if image.format in ("JPEG", "MPO") and (scans := _scans(data)) > _SCANS:
            raise Refused(422, f"image must have at most {_SCANS} scans, got {scans}")
        try:
            return to_rgb(image)
        except Exception as error:
            raise Refused(422, f"image cannot be decoded, it may be truncated or corrupt: {error}") from error
