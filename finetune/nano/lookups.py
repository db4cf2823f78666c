"""Families of questions that need a tool: the price of an item, the weather in a city."""

from __future__ import annotations

import json
from random import Random

from finetune.nano.numbers import multiply_steps, named
from finetune.nano.problem import Call, Problem, by_effort, random_word

PRICE_TOOL: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "get_price",
        "description": "Price of one piece in dollars.",
        "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
    },
}
WEATHER_TOOL: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of today.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ITEMS = (
    "lamp",
    "chair",
    "table",
    "book",
    "pen",
    "cup",
    "plate",
    "bottle",
    "bag",
    "hat",
    "coat",
    "shoe",
    "sock",
    "shirt",
    "clock",
    "phone",
    "desk",
    "bed",
    "sofa",
    "rug",
    "mirror",
    "knife",
    "fork",
    "spoon",
    "pot",
    "pan",
    "kettle",
    "towel",
    "brush",
    "comb",
    "soap",
    "candle",
    "ball",
    "kite",
    "drum",
    "flute",
    "ring",
    "watch",
    "belt",
    "glove",
)
CITIES = (
    "paris",
    "london",
    "rome",
    "berlin",
    "madrid",
    "vienna",
    "oslo",
    "lisbon",
    "athens",
    "dublin",
    "prague",
    "warsaw",
    "tokyo",
    "delhi",
    "cairo",
    "lima",
    "quito",
    "boston",
    "denver",
    "miami",
    "seoul",
    "hanoi",
    "nairobi",
    "lagos",
    "accra",
    "sydney",
    "perth",
    "geneva",
    "zurich",
    "milan",
    "turin",
    "porto",
    "bergen",
)
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy")


def offered(r: Random, needed: dict[str, object]) -> tuple[dict[str, object], ...]:
    """The tools in the conversation: the needed one, at times beside the other."""
    other = WEATHER_TOOL if needed is PRICE_TOOL else PRICE_TOOL
    return r.choice(((needed,), (needed,), (needed, other), (other, needed)))


def price(r: Random) -> Problem:
    item = r.choice(ITEMS) if r.random() < 0.3 else random_word(r)
    count, each = r.randint(2, 9), r.randint(1, 99)
    templates = (
        "What do I pay for {n} of item {item}?",
        "Price of {n} pieces of {item}?",
        "How many dollars for {n} times the {item}?",
    )
    steps = multiply_steps(count, each)
    medium = named(steps)
    call = Call(
        thinking=by_effort(item, f"price of {item}", f"price of {item}, then times {count}"),
        name="get_price",
        arguments=json.dumps({"item": item}),
        result=json.dumps({"price": each}),
    )
    thinking = by_effort(" ".join(steps), medium, f"{medium}, so {count * each} dollars")
    question = r.choice(templates).format(n=count, item=item)
    key = f"{count} {item}"
    return Problem("price", key, question, thinking, f"{count * each} dollars", offered(r, PRICE_TOOL), call)


def weather(r: Random) -> Problem:
    city = (r.choice(CITIES) if r.random() < 0.3 else random_word(r)).capitalize()
    sky, degrees = r.choice(SKIES), r.randint(0, 39)
    templates = ("How is the weather in {}?", "What is the weather like in {}?", "Weather in {}, please.")
    call = Call(
        thinking=by_effort(city, f"weather in {city}", f"weather in {city}, ask the tool"),
        name="get_weather",
        arguments=json.dumps({"city": city}),
        result=json.dumps({"sky": sky, "degrees": degrees}),
    )
    medium = f"{sky}, {degrees}"
    thinking = by_effort(sky, medium, f"{medium}. Check: {city}")
    question = r.choice(templates).format(city)
    answer = f"{sky.capitalize()}, {degrees} degrees."
    return Problem("weather", city, question, thinking, answer, offered(r, WEATHER_TOOL), call)
