"""What the owner of the only SEV guest sends to the firmware, with keys from the firmware's account."""

from __future__ import annotations

import hmac
import subprocess

from .sev import contexts


def keys() -> tuple[bytes, bytes]:
    """TIK and TEK of the only guest."""
    (context,) = contexts()
    return context.tik.to_bytes(16, "big"), context.tek.to_bytes(16, "big")


def authenticated(*parts: bytes) -> bytes:
    return hmac.digest(keys()[0], b"".join(parts), "sha256")


def word(value: int) -> bytes:
    return value.to_bytes(4, "little")


def packet_of(secret: bytes, measured: bytes) -> tuple[bytes, bytes]:
    """What an owner sends: the header, and the encrypted secret."""
    iv = bytes(range(15)) + b"\xff"  # the second block's counter has a carry
    cipher = ["openssl", "enc", "-aes-128-ctr", "-nopad", "-K", keys()[1].hex(), "-iv", iv.hex()]
    encrypted = subprocess.run(cipher, input=secret, capture_output=True, check=True).stdout
    flags, length = word(0), word(len(secret))
    return flags + iv + authenticated(b"\x01", flags, iv, length, length, encrypted, measured), encrypted
