"""Inputs that somebody may have chosen to do harm, and how a test asks for them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

#: Property → inputs that it has seen.
COUNTS: Counter[str] = Counter()

#: What has a meaning in a shell, in XML, in a path, in an option of QEMU, on a terminal, or in a line-based file.
METACHARACTERS = (
    *" \t\n\r\0;&|<>()$`'\"\\*?[]#~=%!{},:/.-\x1b\x7f",
    *("..", "../", "--", "&amp;", "&#10;", "]]>", "<!--", " (deleted)", "$(touch x)", "\x1b[2J"),
    *("\u202e", "\ud800", "\udcff", "\uffff"),
)

#: Any text, rich in what is dangerous.
texts = st.lists(st.one_of(st.sampled_from(METACHARACTERS), st.text(max_size=4)), max_size=8).map("".join)
#: Without what no file name, argument or XML can have: NUL and surrogates.
clean_texts = texts.map(lambda text: "".join(c for c in text if c != "\0" and not "\ud800" <= c <= "\udfff"))
#: Any bytes, rich in what is dangerous.
raw = st.one_of(st.binary(max_size=200), texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
#: Anything that JSON can say.
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def fuzzed(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test with inputs from these strategies, and count them."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        module = function.__module__.rpartition(".")[2]
        name = f"{module.removeprefix('test_')}: {function.__name__.removeprefix('test_')}"

        @functools.wraps(function)
        def counted(*arguments: Any, **inputs: Any) -> None:
            COUNTS[name] += 1
            function(*arguments, **inputs)

        return given(**strategies)(counted)

    return decorate
