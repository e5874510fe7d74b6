"""Parses sizes and rates: 80GB, 80GiB, 10%, 4.8TB/s, 989TFLOP/s.

Owns strict parsing, and formatting of bytes. Decimal prefixes are powers of 1000; binary ones (with
an i) are powers of 1024.
"""

import re
from decimal import Decimal
from fractions import Fraction

from a2sf.errors import InvalidArgument

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZES = {f"{prefix}B": factor for prefix, factor in {**_DECIMAL, **_BINARY}.items()}
_BANDWIDTHS = {f"{unit}/s": factor for unit, factor in _SIZES.items()}
_COMPUTES = {f"{p}FLOP/s": f for p, f in {**_DECIMAL, "P": 10**15}.items() if p in ("G", "T", "P")}


def parse_size(field: str, text: str) -> int:
    """Parse a size in bytes. Raises InvalidArgument unless it is a number with a known unit.

    `field` is the flag of the value.
    """
    return int(_parsed(field, text, _SIZES, "80GB or 80GiB"))


def parse_bandwidth(field: str, text: str) -> int:
    """Parse a rate in bytes per second; raises as `parse_size`."""
    return int(_parsed(field, text, _BANDWIDTHS, "4.8TB/s"))


def parse_compute(field: str, text: str) -> int:
    """Parse a rate in operations per second; raises as `parse_size`."""
    return int(_parsed(field, text, _COMPUTES, "989TFLOP/s"))


def parse_reserve(field: str, text: str, whole: int) -> int:
    """Parse a size in bytes, or a percentage of `whole` such as 10%; raises as `parse_size`."""
    share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text)
    if share is None:
        if re.fullmatch(r"0+", text):
            return 0
        return int(_parsed(field, text, _SIZES, "10%, 0 or 8GB"))
    percent = Fraction(share[1])
    if percent >= 100:
        raise InvalidArgument(field, f"{text!r} leaves nothing; accepted: less than 100%")
    return int(whole * percent / 100)


def binary(nbytes: int) -> str:
    """Format bytes with a binary prefix and one decimal: 15.0 GiB."""
    for unit, factor in reversed(_BINARY.items()):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}B"
    return f"{nbytes} B"


def _parsed(field: str, text: str, units: dict[str, int], example: str) -> Decimal:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z/]+)", text)
    if match is None or match[2] not in units:
        raise InvalidArgument(
            field,
            f"{text!r}; accepted: a number and one of {', '.join(units)}, such as {example}",
        )
    value = Decimal(match[1]) * units[match[2]]
    if value < 1:
        raise InvalidArgument(field, f"{text!r}; accepted: more than 0, such as {example}")
    return value
