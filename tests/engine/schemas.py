"""Random JSON schemas: nested, with every keyword that people use, whose values all end."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

WORDS = ("name", "age", "tags", "größe", "x y", 'quo"te', "zip", "items", "$ref", "a/b")


def random_schema(seed: int) -> Schema:
    """The schema number `seed`; an object more often than not, as people's are."""
    rng = random.Random(seed)
    schema = _object(rng, 2) if rng.random() < 0.7 else _any(rng, 2)
    return schema | {"$defs": {"chain": _chain(rng)}}


def _any(rng: random.Random, depth: int) -> Schema:
    kinds = [_string, _integer, _number, _enum, _constant, _boolean, _format, _pattern]
    if depth:
        kinds += [_object, _object, _array, _tuple, _either, _dictionary, _reference]
    return rng.choice(kinds)(rng, depth - 1)


def _string(rng: random.Random, depth: int) -> Schema:
    shortest = rng.randint(0, 3)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + rng.randint(0, 9)}


def _integer(rng: random.Random, depth: int) -> Schema:
    lowest = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": lowest, "maximum": lowest + rng.randint(0, 5000)}


def _number(rng: random.Random, depth: int) -> Schema:
    lowest = rng.randint(-10, 10)
    return {"type": "number", "exclusiveMinimum": lowest, "maximum": lowest + rng.randint(1, 9)}


def _enum(rng: random.Random, depth: int) -> Schema:
    values = ["red", "rot", 7, 7.5, None, True, "ünï", {"a": [1]}, [], ""]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _constant(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(["one", 1, None, {"b": "c"}, [1, "two"]])}


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _format(rng: random.Random, depth: int) -> Schema:
    return {"type": "string", "format": rng.choice(["date", "date-time", "time", "uuid", "ipv4"])}


def _pattern(rng: random.Random, depth: int) -> Schema:
    patterns = ["^[a-z]{2,5}$", "^(yes|no|maybe)$", r"^\d{3}-\d{4}$", "^[A-Z][a-z]*[0-9]?$"]
    return {"type": "string", "pattern": rng.choice(patterns)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _dictionary(rng: random.Random, depth: int) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^[a-z_]{1,6}$": _any(rng, 0)},
        "additionalProperties": False,
        "maxProperties": 2,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    fewest = rng.randint(0, 2)
    return {
        "type": "array",
        "items": _any(rng, depth),
        "minItems": fewest,
        "maxItems": fewest + rng.randint(0, 2),
    }


def _tuple(rng: random.Random, depth: int) -> Schema:
    places = [_any(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": places, "items": False, "minItems": len(places)}


def _either(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(1, 3))]}


def _reference(rng: random.Random, depth: int) -> Schema:
    return {"$ref": "#/$defs/chain"}


def _chain(rng: random.Random) -> Schema:
    """A list without arrays: it refers to itself."""
    return {
        "type": "object",
        "properties": {
            "value": _any(rng, 0),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/chain"}]},
        },
        "required": ["value", "next"],
        "additionalProperties": False,
    }
