"""The held-out split: by a hash of what is asked, so that it does not move when rows are added."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

_json = json.JSONEncoder(ensure_ascii=False, default=str)


def question_key(row: Mapping[str, Any]) -> int:
    """64 bits of a hash over the messages of a harmony row that are not the assistant's or a tool's.

    Two rows that ask the same get the same key whatever their answers, thinking or settings, so a held-out
    question is never one that was trained on.
    """
    asked = [
        (message.get("role"), message.get("content"))
        for message in row["messages"]
        if isinstance(message, Mapping) and message.get("role") not in ("assistant", "tool")
    ]
    text = _json.encode(asked)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def held_out_below(share: float, lowest: int, highest: int) -> int:
    """The bound below which a key is held out, given the lowest and highest key of all rows.

    It is `share` of all 64-bit numbers. With a share above 0 and at least two different keys both sides get
    something: where that bound leaves one of them empty (few rows), the lowest key is held out, or the
    highest is trained on. Only then can added rows move others.
    """
    if share <= 0 or lowest == highest:
        return 0
    bound = int(share * 2.0**64)
    if lowest >= bound:
        return lowest + 1
    return min(bound, highest)
