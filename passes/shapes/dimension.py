"""The size of one axis of a tensor, as a polynomial of the graph's symbolic dimensions."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce

Monomial = tuple[str, ...]
UNKNOWN = "?"
"""What the names of symbols begin with that stand for a size of which nothing is known."""
_SUM = re.compile(r"[A-Za-z_]\w*( \+ \w+)+")


def summands(size: str) -> list[str]:
    """The parts of a dimension that an input declares as a sum ('past_sequence + sequence'); of any other, itself."""
    return size.split(" + ") if _SUM.fullmatch(size) else [size]


def size_at(size: int | str, sizes: Mapping[str, int]) -> int:
    """The number that a declared dimension is where the symbols have these `sizes`. Raises KeyError for one without."""
    if isinstance(size, int):
        return size
    return sum(int(part) if part.isdecimal() else sizes[part] for part in summands(size))


@dataclass(frozen=True)
class Dimension:
    """A size: a sum of products of symbols, each with an integer factor. Equal ones are equal in every run."""

    terms: frozenset[tuple[Monomial, int]]

    @staticmethod
    @lru_cache(1 << 12)
    def of(value: int | str) -> Dimension:
        if isinstance(value, str):
            return Dimension(frozenset({((value,), 1)}))
        return Dimension(frozenset({((), value)} if value else ()))

    @staticmethod
    def named(name: str) -> Dimension:
        """What a model calls a size; a sum of others is one, and a multiple. A number added to it is not believed.

        Exporters write `past_sequence_length + sequence_length` or `4*batch`, and mean it; optimum writes
        `past_sequence_length + 1` where any number of tokens may follow.
        """
        parts = [part.rpartition("*") for part in name.split(" + ")]
        if not all(symbol.isidentifier() and (factor.isdecimal() or not star) for factor, star, symbol in parts):
            return Dimension.of(name)
        multiples = (Dimension.of(int(factor or 1)) * Dimension.of(symbol) for factor, _, symbol in parts)
        return reduce(Dimension.__add__, multiples)

    @cached_property
    def number(self) -> int | None:
        """The size as an integer; None where it depends on the inputs."""
        if not self.terms:
            return 0
        (symbols, factor), *others = self.terms
        return factor if not symbols and not others else None

    @property
    def positive(self) -> bool:
        """Whether no term is negative: true for every size that a tensor can have, false for -1."""
        return all(factor > 0 for _, factor in self.terms)

    @cached_property
    def is_unknown(self) -> bool:
        """Whether nothing is known of it."""
        return len(self.terms) == 1 and all(len(s) == 1 and s[0][0] == UNKNOWN and f == 1 for s, f in self.terms)

    def __add__(self, other: Dimension) -> Dimension:
        total: Counter[Monomial] = Counter()
        for symbols, factor in (*self.terms, *other.terms):
            total[symbols] += factor
        return Dimension(frozenset((s, f) for s, f in total.items() if f))

    def __mul__(self, other: Dimension) -> Dimension:
        total: Counter[Monomial] = Counter()
        for (left, a), (right, b) in itertools.product(self.terms, other.terms):
            total[tuple(sorted(left + right))] += a * b
        return Dimension(frozenset((s, f) for s, f in total.items() if f))

    def over(self, other: Dimension) -> Dimension | None:
        """The quotient where it is exact for all inputs and the divisor is one product; else None."""
        if len(other.terms) != 1:
            return None
        ((symbols, divisor),) = other.terms
        quotient = set()
        for product, factor in self.terms:
            left = Counter(product)
            left.subtract(symbols)
            if factor % divisor or any(count < 0 for count in left.values()):
                return None
            quotient.add((tuple(sorted(left.elements())), factor // divisor))
        return Dimension(frozenset(quotient))

    def __str__(self) -> str:
        products = (
            "*".join([str(f)] * (f != 1 or not s) + [UNKNOWN if n[0] == UNKNOWN else n for n in s])
            for s, f in sorted(self.terms, key=lambda term: (not term[0], term[0]))
        )
        return " + ".join(products) or "0"


ONE = Dimension.of(1)
Shape = tuple[Dimension, ...]
Values = tuple[Dimension | bool | None, ...]
"""The elements of a small integer or boolean tensor, in row-major order; None for one that is not known."""


def product(sizes: Sequence[Dimension]) -> Dimension:
    """How many elements a tensor of these sizes has."""
    return reduce(Dimension.__mul__, sizes, ONE)
