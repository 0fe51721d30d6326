"""What strangers send: a request's image and adapter name, each checked before it costs memory or time.

Pillow and Starlette are imported where they are used; the extra ``serve`` has both.
"""

import io
import re
from dataclasses import dataclass

_FORMATS = ("JPEG", "PNG", "WEBP")  # and MPO, a JPEG with further pictures behind it, as phones make them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_RAW = "", "application/octet-stream", "application/x-www-form-urlencoded"  # the last is what curl --data-binary says
_LONGEST = 100  # times its shorter side: a transform brings that to the model's size, the longer one grows with it
_SCANS = 64  # passes over a progressive JPEG; encoders make about ten, each costs a decoder all pixels


class Refused(Exception):
    """A request that is answered with ``status`` and this sentence. 4xx: it would be refused again."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Upload:
    """An image as it was sent, and the adapter that is to look at it; None for the model without one."""

    image: bytes
    adapter: str | None
    top: int


def check_adapter_name(name: str | None) -> str | None:
    """The name, or None for an empty one.

    Raises:
        Refused: 400, a name that could be a path.
    """
    if not name:
        return None
    if not _NAME.fullmatch(name):
        raise Refused(400, f"adapter must be letters, digits, '_', '-' and '.', at most 100, got {name[:120]!r}")
    return name


async def read_upload(request, *, max_bytes: int) -> Upload:
    """The upload in a Starlette request.

    Either the body is the image, or it is multipart/form-data with a file ``image``. ``adapter`` and ``top`` (how many
    scores are wanted, 5) are query parameters, or fields of the form.

    Raises:
        Refused: 411 or 400 for a length that is missing or no number, 413 for more than max_bytes, 415 for another type
            of content, 400 for a form that cannot be read or lacks the image, for a bad name and a bad number.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not form and kind not in _RAW and not kind.startswith("image/"):
        known = "image/*, application/octet-stream or multipart/form-data"
        raise Refused(415, f"content-type must be {known}, got {kind[:80]!r}")
    # the fields of a form, and what is between them
    body = await _body(request, max_bytes + 4096 * form)
    fields = dict(request.query_params)
    if form:
        image, more = await _form(request, body)
        fields |= more
    else:
        image = body
    if not image:
        raise Refused(400, "image must not be empty")
    if len(image) > max_bytes:
        raise Refused(413, f"image must have at most {max_bytes} bytes, got {len(image)}")
    top = fields.get("top", "5")
    if not (top.isascii() and top.isdigit() and 1 <= int(top[:9]) <= 100_000):
        raise Refused(400, f"top must be a number from 1 to 100000, got {top[:20]!r}")
    return Upload(image, check_adapter_name(fields.get("adapter")), int(top))


async def _body(request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length")
    if declared is not None:
        if not (declared.isascii() and declared.isdigit()):
            raise Refused(400, f"content-length must be a number, got {declared[:20]!r}")
        if len(declared) > 15 or int(declared) > max_bytes:
            raise Refused(413, f"the body must have at most {max_bytes} bytes, got {declared[:20]}")
    chunks, total = [], 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > max_bytes:  # the length was not declared, or was a lie
            raise Refused(413, f"the body must have at most {max_bytes} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


async def _form(request, body: bytes) -> tuple[bytes, dict[str, str]]:
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
        return await image.read(), {key: value for key, value in form.items() if isinstance(value, str)}
    finally:
        await form.close()


def decode(data: bytes, *, max_pixels: int):
    """The picture in a JPEG, PNG or WebP file, upright, as a PIL image of mode RGB.

    Its size is read from the header and checked before anything is decoded. Palettes, CMYK, greys of 8 and 16 bits and
    transparency (dropped) become RGB; EXIF orientation is applied.

    Raises:
        Refused: 413 for more than max_pixels, 415 for another format, 422 for an animation, for a picture that is a
            line, and for a file that is truncated, corrupt or made to keep a decoder busy.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise Refused(415, f"image must be a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file that is whole") from error
    except Image.DecompressionBombError as error:
        raise Refused(413, f"image must have at most {max_pixels} pixels: {error}") from error
    except Exception as error:  # decoders raise whatever they run into
        raise Refused(422, f"image cannot be read: {error}") from error
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise Refused(413, f"image must have at most {max_pixels} pixels, got {width} x {height}")
        if max(width, height) > _LONGEST * min(width, height):
            raise Refused(422, f"image must be at most {_LONGEST} times as long as it is wide, got {width} x {height}")
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise Refused(422, f"image must be one picture, got an animation of {image.n_frames}")
        if image.format in ("JPEG", "MPO") and (scans := data.count(b"\xff\xda")) > _SCANS:
            raise Refused(422, f"image must have at most {_SCANS} scans, got {scans}")
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
                image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            return image.convert("RGB")
        except Exception as error:
            raise Refused(422, f"image cannot be decoded, it may be truncated or corrupt: {error}") from error
