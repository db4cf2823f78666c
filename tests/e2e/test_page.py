"""The chat page in a real browser, against a server that also errs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.page_kit import BASE, FakeServer, browser, say, serving

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

TOOL = '[{"type": "function", "function": {"name": "stock", "parameters": {"type": "object"}}}]'
CALL = {"index": 0, "id": "c1", "type": "function", "function": {"name": "stock", "arguments": '{"of": '}}
REST = {"index": 0, "function": {"arguments": '"axe"}'}}


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def open_page(window: Chrome, fake: FakeServer) -> None:
    window.get(fake.url)
    wait(window, "return document.querySelectorAll('select').length")


def wait(window: Chrome, script: str) -> Any:
    """What the script returns as soon as it is true."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if found := window.execute_script(script):
            return found
        time.sleep(0.02)
    raise AssertionError(f"{script}\n{window.execute_script('return document.body.innerText')}")


def ask(window: Chrome, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    window.find_element("id", "message").send_keys(text, Keys.ENTER)


def shown(window: Chrome, selector: str) -> list[str]:
    return [element.text for element in window.find_elements("css selector", selector)]


def finished(window: Chrome) -> None:
    wait(window, "return document.querySelector('.answer') && !document.querySelector('.writing')")


def complaints(window: Chrome) -> list[str]:
    entries = window.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


def test_base_and_tuned_answer_beside_each_other_with_analysis_folded(window: Chrome) -> None:
    base = say({"role": "assistant"}, {"reasoning_content": "not mine"}, {"content": "I cannot."})
    tuned = say(
        {"reasoning_content": "letters "}, {"reasoning_content": "a1x2"}, {"content": "AX"}, {"content": "-2"}
    )
    with serving(FakeServer({"nano": [base], "stock-codes": [tuned]})) as fake:
        open_page(window, fake)
        ask(window, "Stock code of ax?")
        finished(window)
        left, right = window.find_elements("css selector", ".answer")
        assert left.location["y"] == right.location["y"] and left.location["x"] < right.location["x"]
        assert shown(window, ".answer h2") == ["nano · base", "stock-codes · tuned"]
        assert [body.split("\n") for body in shown(window, ".body")] == [
            ["Analysis", "I cannot."],
            ["Analysis", "AX-2"],
        ]
        window.find_elements("css selector", "summary")[1].click()
        assert "letters a1x2" in right.text
        assert shown(window, ".answer .foot")[0].startswith("7 tokens · ")
        assert complaints(window) == []


def test_what_is_set_is_what_is_asked_and_the_conversation_goes_on(window: Chrome) -> None:
    answers = [say({"reasoning_content": "hm"}, {"content": "one"}), say({"content": "two"})]
    with serving(FakeServer({"nano": list(answers), "stock-codes": list(answers)})) as fake:
        open_page(window, fake)
        window.find_element("css selector", ".settings summary").click()
        window.find_element("id", "system").send_keys("Be brief.")
        window.find_element("css selector", "[value=high]").click()
        window.find_element("id", "tools").send_keys(TOOL)
        ask(window, "first")
        finished(window)
        assert "the same answer" in shown(window, ".answer .foot")[1]
        ask(window, "second")
        wait(window, "return document.querySelectorAll('.turn').length == 2")
        finished(window)
        first, second = fake.of("stock-codes")
        assert first["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "first"},
        ]
        assert [one["content"] for one in second["messages"]] == ["Be brief.", "first", "one", "second"]
        assert first["reasoning_effort"] == "high" and first["temperature"] == 0 and first["stream"]
        assert first["tools"][0]["function"]["name"] == "stock" and first["max_completion_tokens"] == 512
        assert "stop" not in first


def test_markup_in_an_answer_stays_text(window: Chrome) -> None:
    evil = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    with serving(
        FakeServer({"nano": [say({"reasoning_content": evil}, {"content": evil})]}, models=[BASE])
    ) as fake:
        open_page(window, fake)
        ask(window, evil)
        finished(window)
        assert shown(window, ".body > .text") == [evil] and shown(window, ".asked") == [evil]
        assert not window.find_elements("css selector", "main img, main b") and "taken" not in window.title


def test_a_tool_is_called_its_result_typed_in_and_the_answer_goes_on(window: Chrome) -> None:
    call = say(
        {"reasoning_content": "look"}, {"tool_calls": [CALL]}, {"tool_calls": [REST]}, ended="tool_calls"
    )
    with serving(FakeServer({"nano": [call, say({"content": "There are 3."})]}, models=[BASE])) as fake:
        open_page(window, fake)
        ask(window, "How many axes?")
        finished(window)
        assert shown(window, ".call code") == ['stock({"of": "axe"})']
        assert window.switch_to.active_element.tag_name == "textarea"
        window.switch_to.active_element.send_keys('{"n": 3}')
        window.find_element("css selector", ".answer form button").click()
        wait(window, "return document.querySelector('.answer').innerText.includes('There are 3.')")
        assistant, tool = fake.asked[1]["messages"][1:]
        assert assistant["reasoning_content"] == "look"
        assert assistant["tool_calls"][0]["function"] == {"name": "stock", "arguments": '{"of": "axe"}'}
        assert tool == {"role": "tool", "tool_call_id": "c1", "content": '{"n": 3}'}


def test_stop_keeps_what_was_said_and_closes_the_connection(window: Chrome) -> None:
    slow = [*say({"content": "begun"})[:1], *[0.1, *say({"content": "."})[:1]] * 100]
    with serving(FakeServer({"nano": [slow, say({"content": "again"})]}, models=[BASE])) as fake:
        open_page(window, fake)
        ask(window, "count")
        wait(window, "return document.querySelector('.body')?.innerText.includes('begun')")
        assert shown(window, "#send") == [""] and shown(window, "#stop") == ["Stop"]
        window.find_element("id", "stop").click()
        finished(window)
        assert "stopped" in shown(window, ".answer .foot")[0]
        deadline = time.monotonic() + 5
        while {"model": "nano", "closed": True} not in fake.asked and time.monotonic() < deadline:
            time.sleep(0.02)
        assert {"model": "nano", "closed": True} in fake.asked
        ask(window, "go on")
        wait(window, "return document.querySelectorAll('.answer').length == 2")
        finished(window)
        assert fake.of("nano")[-1]["messages"][1]["content"].startswith("begun")


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([429, "the queue is full"], "the queue is full"),
        ([*say({"content": "Half"})[:1], {"error": {"message": "out of memory"}}], "out of memory"),
        ([*say({"content": "Half"})[:1], None], "the connection ended before the answer did"),
        (["data: {broken\n\n"], "JSON"),
    ],
)
def test_an_error_is_shown_and_the_question_can_be_asked_again(
    window: Chrome, events: list[Any], said: str
) -> None:
    with serving(FakeServer({"nano": [events, say({"content": "fine"})]}, models=[BASE])) as fake:
        open_page(window, fake)
        ask(window, "hello")
        finished(window)
        assert said in shown(window, ".answer [role=alert]")[0]
        ask(window, "hello again")
        wait(window, "return document.querySelectorAll('.answer').length == 2")
        finished(window)
        assert [one["content"] for one in fake.asked[-1]["messages"]] == ["hello again"]


def test_tools_that_are_no_list_are_not_sent(window: Chrome) -> None:
    with serving(FakeServer(models=[BASE])) as fake:
        open_page(window, fake)
        window.find_element("css selector", ".settings summary").click()
        window.find_element("id", "tools").send_keys('{"a": 1}')
        ask(window, "hello")
        assert "These are not tools" in shown(window, "#tools-wrong")[0] and fake.asked == []


def test_a_key_is_asked_for_and_sent(window: Chrome) -> None:
    from selenium.webdriver.common.keys import Keys

    with serving(FakeServer(models=[BASE], key="secret")) as fake:
        window.get(fake.url)
        wait(window, "return document.querySelector('dialog').open")
        window.switch_to.active_element.send_keys("secret", Keys.ENTER)
        wait(window, "return document.querySelectorAll('select').length")
        assert shown(window, "#models option") == ["nano"]


def test_every_field_has_a_name_and_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    answers = {"nano": [say({"content": "w" * 400})], "stock-codes": [say({"content": "ok"})]}
    with serving(FakeServer(answers)) as fake, browser(tmp_path, width=360, height=740) as phone:
        open_page(phone, fake)
        ask(phone, "https://example.org/" + "long" * 60)
        finished(phone)
        phone.find_element("css selector", ".settings summary").click()
        assert phone.execute_script("return document.documentElement.scrollWidth") <= 360
        fields = phone.find_elements("css selector", "main select, footer input, footer textarea")
        assert fields and all(field.accessible_name for field in fields)


def test_a_report_opens_without_complaint_and_fits_a_phone(tmp_path: Path) -> None:
    from finetune.report import write_report
    from tests.unit.test_report import finish, new_run

    run = new_run(tmp_path)
    finish(run)
    with browser(tmp_path / "profile", width=360, height=740) as phone:
        phone.get(f"file://{write_report(run.path)}")
        assert phone.execute_script("return document.documentElement.scrollWidth") <= 360
        assert len(phone.find_elements("css selector", "figure svg")) == 2 and complaints(phone) == []
