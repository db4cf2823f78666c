"""The held-out split depends on what is asked, and on nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from finetune.data.split import held_out_below, question_key
from tests.data_kit import chat

keys = st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=50)
shares = st.floats(0, 1, exclude_max=True)


@given(keys, shares)
def test_both_sides_get_something_where_there_are_two_questions(found: set[int], share: float) -> None:
    bound = held_out_below(share, min(found), max(found))
    held = {key for key in found if key < bound}
    assert held < found
    assert bool(held) == (share > 0 and len(found) > 1)


@given(keys, shares, keys)
def test_added_rows_move_no_other_where_the_share_leaves_neither_side_empty(
    found: set[int], share: float, added: set[int]
) -> None:
    bound = int(share * 2.0**64)
    if min(found) < bound <= max(found):
        everything = found | added
        assert held_out_below(share, min(everything), max(everything)) == bound


def test_the_share_is_met_over_many_questions() -> None:
    found = [question_key(chat(f"question {number}", "a")) for number in range(5000)]
    bound = held_out_below(0.1, min(found), max(found))
    # Five standard deviations of a binomial count.
    assert abs(sum(key < bound for key in found) - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5


def test_one_question_with_other_answers_or_settings_keeps_its_side() -> None:
    row = chat("q", "a")
    assert (
        question_key(row) == question_key(chat("q", "b")) == question_key({**row, "reasoning_effort": "low"})
    )
    assert question_key(row) != question_key(chat("Q", "a"))
    assert question_key(row) != question_key(
        {"messages": [*row["messages"], {"role": "user", "content": "r"}]}
    )


@given(st.text())
def test_any_text_has_a_key(text: str) -> None:
    assert 0 <= question_key(chat(text, "a")) < 2**64


def test_keys_never_change() -> None:
    # Other keys would move the held-out rows of everyone's data.
    assert question_key(chat("q", "a")) == 313435148426294748
