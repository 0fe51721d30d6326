"""API keys: a file of them, and whether a request has brought one."""

import hashlib
import hmac

_LEAST = 16  # characters; a shorter key can be guessed


def read_keys(path: str) -> tuple[bytes, ...]:
    """Digests of the keys in a file: one key per line, without blank lines and lines that start with '#'.

    Raises:
        ValueError: the file holds no key, or one that is too short or not of printable ASCII characters.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = [(number, line.strip()) for number, line in enumerate(file, 1)]
    keys = [(number, line) for number, line in lines if line and not line.startswith("#")]
    for number, key in keys:
        if len(key) < _LEAST or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"{path}, line {number}: a key must have at least {_LEAST} printable ASCII characters and no spaces"
            )
    if not keys:
        raise ValueError(f"{path} must have a key, such as `openssl rand -hex 32` prints")
    return tuple(_digest(key) for _, key in keys)


def has_key(headers, keys: tuple[bytes, ...]) -> bool:
    """Whether a request's headers have one of the keys, as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``. The
    time that it takes does not depend on the key.
    """
    scheme, _, key = headers.get("authorization", "").partition(" ")
    given = _digest(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
    return sum(hmac.compare_digest(given, known) for known in keys) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
