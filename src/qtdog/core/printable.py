"""Text that reaches a terminal as characters alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

# C0 and C1 controls, format characters that reorder or hide text, separators that break lines, lone surrogates
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\ufff9-\ufffb]"
)


def printable(text: str) -> str:
    r"""Return text that cannot reach a terminal as more than characters: what is none is a `?`.

    Line breaks and tabs stay. Escape sequences color, move and overwrite what is on the screen, change its title, and
    in some terminals type for the user; names of classes, tensors and files may hold them.

    Example:
        >>> printable("a\x1b[31mred\rb")
        'a?[31mred?b'
    """
    return _UNPRINTABLE.sub("?", text)


def legend_columns(labels: Sequence[str], width_in: float) -> int:
    """Return in how many columns, at most three, a legend of 8 points fits below a figure of a width in inches.

    Example:
        >>> legend_columns(["float", "lsq"], 5.2), legend_columns(["erm + ema-of-the-gallery + float: target"] * 2, 5.2)
        (2, 1)
    """
    column_in = 0.5 + 0.065 * max(map(len, labels), default=0)  # handle and space, then letters
    return max(1, min(3, len(labels), int(width_in / column_in)))


def one_line(text: str) -> str:
    r"""Return printable text of one line.

    Example:
        >>> one_line("a\nb\tc")
        'a?b?c'
    """
    return re.sub(r"[\n\t]", "?", printable(text))
