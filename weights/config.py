"""Reads a config.json: each value is checked when it is read. Start at Config."""

from collections.abc import Callable, Collection
from typing import Any

from host.files import short_json

# Every maximum in this file is far above any real model's value: a larger value is a mistake.
MAX_POSITIONS = 2**31
REQUIRED: Any = object()  # stands for a `default` or a `null` that the caller did not give


class Config:
    """The values of a config.json, or of an object within it, each checked when it is read.

    values: the parsed JSON; ValueError if it is no object. where: the object's name in errors.

    Methods read the value of `key`. default: returned for a missing key; without it a missing key
    is an error. null: returned if the value is null; without it null is an error, as in
    transformers. Neither is checked. Errors are ValueErrors of one line with the key, its value and
    the expected values.
    """

    def __init__(self, values: Any, where: str = "config.json"):
        if not isinstance(values, dict):
            raise ValueError(f"{where} is {short_json(values)} and must be an object with keys")
        self.values, self.where = values, where

    def integer(
        self, key: str, default: Any = REQUIRED, *, null: Any = REQUIRED, maximum: int = 2**24
    ) -> Any:
        """Returns an integer from 1 to maximum. 256.0 is an error, as in transformers 5."""

        def fits(value: Any) -> bool:  # `type`, not isinstance: true is no integer
            return type(value) is int and 1 <= value <= maximum

        return self._read(key, fits, f"an integer from 1 to {maximum}", default, null)

    def count(self, key: str, default: int) -> int:
        """Returns an integer from 0 to 2**24. null is an error."""

        def fits(value: Any) -> bool:
            return type(value) is int and 0 <= value <= 2**24

        return self._read(key, fits, "an integer from 0 to 2**24", default)

    def number(
        self, key: str, default: Any = REQUIRED, *, null: Any = REQUIRED, maximum: float = 1e15
    ) -> Any:
        """Returns a number above 0 and at most maximum, as a float."""

        def fits(value: Any) -> bool:
            return type(value) in (int, float) and 0 < value <= maximum

        expected = f"a number above 0 and at most {maximum:g}"
        value = self._read(key, fits, expected, default, null)
        return float(value) if fits(value) else value  # `default` or `null` may be None or 0

    def positions(self, key: str, default: Any = REQUIRED, *, null: Any = REQUIRED) -> Any:
        """Returns a number of positions: an integer from 1 to MAX_POSITIONS."""
        return self.integer(key, default, null=null, maximum=MAX_POSITIONS)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Returns the `count` numbers of a list, all above 0, as floats. The key must exist."""

        def fits(value: Any) -> bool:
            listed = isinstance(value, list) and len(value) == count
            return listed and all(type(x) in (int, float) and 0 < x < 1e15 for x in value)

        return tuple(map(float, self._read(key, fits, f"a list of {count} numbers above 0")))

    def choices(self, key: str, supported: Collection[Any], count: int) -> tuple[Any, ...] | None:
        """Returns the `count` values of a list, each one of `supported`; None if the key is absent
        or null."""

        def fits(value: Any) -> bool:
            listed = isinstance(value, list) and len(value) == count
            # The types, too: true == 1 and 1.0 == 1 in Python.
            return listed and all(type(x) in types and x in supported for x in value)

        types = {type(x) for x in supported}
        expected = f"a list of {count} of those that are supported: {short_json(list(supported))}"
        value = self._read(key, fits, expected, None, None)
        return value if value is None else tuple(value)

    def flag(self, key: str, default: bool, *, null: Any = REQUIRED) -> bool:
        """Returns a boolean."""
        return self._read(key, lambda v: isinstance(v, bool), "true or false", default, null)

    def refuse(self, key: str, accepted: Collection[Any], why: str) -> None:
        """Raises ValueError if the key has a value that is neither null nor one of `accepted`.

        accepted: () refuses every value. why: the reason, in words that follow "KEY is VALUE, and".
        """
        value = self.values.get(key)
        if value is not None and value not in accepted:
            raise ValueError(f"{self.where}: '{key}' is {short_json(value)}, and {why}")

    def choice(
        self,
        key: str,
        supported: Collection[str],
        default: Any = REQUIRED,
        *,
        null: Any = REQUIRED,
    ) -> str:
        """Returns a string that is one of the supported values, or `default` or `null` (see the
        class), which need not be among them."""

        def fits(value: Any) -> bool:
            return isinstance(value, str) and value in supported

        expected = f"one of those that are supported: {', '.join(supported)}"
        return self._read(key, fits, expected, default, null)

    def section(self, key: str) -> "Config":
        """Returns the object of this key as a Config, an empty one if the key is absent or null."""
        values = self._read(key, lambda v: isinstance(v, dict), "an object with keys", {}, {})
        return Config(values, f"{self.where}, {key}")

    def _read(
        self,
        key: str,
        fits: Callable[[Any], bool],
        expected: str,
        default: Any = REQUIRED,
        null: Any = REQUIRED,
    ) -> Any:
        """Returns the value of a key, its `default` or `null` (see the class).

        fits: whether a value is valid. expected: the valid values in words, for the error.
        """
        if key not in self.values:
            if default is REQUIRED:
                raise ValueError(f"{self.where} has no '{key}', which must be {expected}")
            return default
        value = self.values[key]
        if value is None and null is not REQUIRED:
            return null
        if not fits(value):
            raise ValueError(f"{self.where}: '{key}' is {short_json(value)} and must be {expected}")
        return value
