"""Changes one field of a JSON file that others wrote, and keeps every other byte."""

import json
from typing import Any


def with_field(text: str, name: str, value: Any) -> str:
    """Returns the text of a JSON object with another value for a field; a new field comes first.
    Every other character is unchanged."""
    decoder, first = json.JSONDecoder(), text.index("{") + 1
    place, found = _next(text, first), None
    while text[place] == '"':
        key, place = decoder.raw_decode(text, place)
        start = _next(text, place)
        _, place = decoder.raw_decode(text, start)
        if key == name:  # of repeated keys the last one counts
            found = start, place
        place = _next(text, place)
    if found is not None:
        return text[: found[0]] + json.dumps(value) + text[found[1] :]
    indent, rest = text[first : _next(text, first)], text[first:]
    comma = "," if text[_next(text, first)] == '"' else ""
    return f"{text[:first]}{indent}{json.dumps(name)}: {json.dumps(value)}{comma}{rest}"


def _next(text: str, place: int) -> int:
    """The position of the next key, value or bracket."""
    while text[place] in " \t\r\n,:":
        place += 1
    return place
