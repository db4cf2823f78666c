from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from finetune.chat import HarmonyEncoder, Message
from finetune.errors import FinetuneError
from finetune.evaluate import compare, talk
from finetune.evaluate.compare import evaluate
from finetune.evaluate.prompts import Setting
from finetune.evaluate.subject import Subject, load_subject
from finetune.evaluate.summary import Score, Summary, TaskResult
from finetune.model import add_lora, fingerprint, load_base, save_adapter
from finetune.recipe import EvalSpec, Recipe, Task
from finetune.rundir import RunDir
from tests.checkpoints import write_random_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of a random model: its answers are nonsense, its files are real."""
    folder = tmp_path_factory.mktemp("run")
    base = write_random_checkpoint(folder / "base", tokenizer="bytes")
    rows = "".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(30))
    (folder / "rows.jsonl").write_text(rows)
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"base": str(base), "dense": "float32"},
            "data": {"train": [{"path": str(folder / "rows.jsonl")}], "held_out": 0.3, "max_tokens": 400},
            "eval": {
                "tasks": [
                    {"name": "sums", "path": "held_out"},
                    {"name": "numbers", "path": str(folder / "rows.jsonl"), "metric": "number", "limit": 4},
                ],
                "max_new_tokens": 6,
            },
        }
    )
    run = RunDir.create(recipe, folder / "runs")
    run.update(base={"where": str(base), "fingerprint": fingerprint(base)})
    torch.manual_seed(0)
    model = add_lora(
        load_base(base, dtype=torch.float32, device="cpu"), rank=2, alpha=4, targets=["attention", "experts"]
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    save_adapter(model, run.adapter, base=base)
    return run


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_run_is_measured_and_its_files_have_the_fixed_shape(run: RunDir) -> None:
    summary = evaluate(run.path, console=quiet())
    written = json.loads((run.eval_dir / "summary.json").read_text())
    assert written == summary.to_dict()
    assert written.keys() == {"held_out_loss", "tasks"}
    assert written["held_out_loss"].keys() == {"base", "tuned"}
    assert written["held_out_loss"]["base"] != written["held_out_loss"]["tuned"]
    task = written["tasks"]["numbers"]
    assert task.keys() == {"metric", "n", "base", "tuned", "empty", "truncated"}
    assert task["base"].keys() == task["tuned"].keys() == {"value", "low", "high"}
    assert (task["metric"], task["n"]) == ("number", 4)
    assert not list(run.eval_dir.glob("*.part"))


def test_every_answer_is_kept_with_its_question_and_verdict(run: RunDir) -> None:
    evaluate(run.path, limit=3, console=quiet())
    lines = [json.loads(line) for line in (run.eval_dir / "sums.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert line.keys() == {"question", "reference", "base", "tuned"}
        assert line["tuned"].keys() == {"right", "thinking", "content", "tool_calls", "ended", "tokens"}
        assert line["tuned"]["tokens"] <= 6


def test_held_out_questions_are_rows_that_were_not_trained_on(run: RunDir) -> None:
    from finetune.data import prepare_data

    prepared = prepare_data(run.recipe(), load_subject(run.path).encoder, cache_dir=run.cache)
    summary = evaluate(run.path, console=quiet())
    assert summary.tasks["sums"].n == len(prepared.held_out)


def test_overrides_change_what_is_measured_and_a_limit_holds_for_all_tasks(run: RunDir) -> None:
    summary = evaluate(run.path, overrides=["eval.max_new_tokens=1"], limit=2, console=quiet())
    assert {result.n for result in summary.tasks.values()} == {2}
    assert {result.truncated for result in summary.tasks.values()} == {2}
    assert {result.empty for result in summary.tasks.values()} == {2}


def test_a_checkpoint_without_a_run_is_measured_alone_on_the_tasks_given(run: RunDir) -> None:
    base = run.recipe().model.base
    rows = str(run.path.parent.parent / "rows.jsonl")
    spec = EvalSpec(tasks=[Task(name="t", path=rows, limit=2)], max_new_tokens=3)
    before = set(Path(base).rglob("*"))
    summary = evaluate(base, spec=spec, console=quiet()).to_dict()
    assert summary["held_out_loss"] == {"base": None, "tuned": None}
    assert summary["tasks"]["t"]["tuned"] is None
    assert summary["tasks"]["t"]["n"] == 2
    assert set(Path(base).rglob("*")) == before
    with pytest.raises(FinetuneError, match="name a task"):
        evaluate(base, console=quiet())
    with pytest.raises(FinetuneError, match=r"no recipe for eval\.seed=1 to change"):
        evaluate(base, overrides=["eval.seed=1"], spec=spec, console=quiet())


def test_a_bad_task_is_found_before_weights_are_loaded(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "load_subject", lambda where: pytest.fail("weights were loaded"))
    with pytest.raises(FinetuneError, match="no such"):
        evaluate(run.path, spec=EvalSpec(tasks=[Task(name="t", path="missing.jsonl")]), console=quiet())


def test_rows_without_an_answer_are_told_of(run: RunDir, tmp_path: Path) -> None:
    rows = [{"question": "1?", "answer": "1"}, {"messages": [{"role": "user", "content": "2?"}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = quiet()
    spec = EvalSpec(tasks=[Task(name="t", path=str(tmp_path / "rows.jsonl"))], max_new_tokens=1)
    assert evaluate(run.recipe().model.base, spec=spec, console=console).tasks["t"].n == 1
    assert "t: 1 of 2 rows end in no answer" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_measurement_aside_leaves_the_whole_evaluation_as_it_is(run: RunDir) -> None:
    (run.eval_dir / "summary.json").write_text("{}")
    summary = evaluate(run.path, limit=1, aside="first-1", console=quiet())
    assert (run.eval_dir / "summary.json").read_text() == "{}"
    assert json.loads((run.eval_dir / "first-1" / "summary.json").read_text()) == summary.to_dict()


def test_a_checkpoint_of_a_run_is_measured_beside_itself(run: RunDir) -> None:
    checkpoint = run.path / "checkpoints" / "step-000002"
    shutil.copytree(run.adapter, checkpoint)
    summary = evaluate(checkpoint, limit=1, console=quiet())
    assert json.loads((checkpoint / "eval" / "summary.json").read_text()) == summary.to_dict()
    assert summary.tuned_loss is not None


def test_an_unfinished_run_is_not_taken_for_its_base(run: RunDir, tmp_path: Path) -> None:
    unfinished = RunDir.create(run.recipe(), tmp_path / "runs")
    unfinished.update(base=run.info()["base"])
    with pytest.raises(FinetuneError, match=r"no adapter yet; finetune train .* goes on"):
        load_subject(unfinished.path)


def test_the_table_shows_losses_scores_and_intervals() -> None:
    result = TaskResult("exact_match", 20, Score(0, 20), Score(19, 20), empty=1, truncated=0)
    console = Console(file=io.StringIO(), width=140)
    console.print(Summary(2.5, 0.25, {"sums": result}).table())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for figure in ("2.5000", "0.2500", "0.0%", "95.0%", "(76.4% to 99.1%)"):
        assert figure in shown


def test_the_base_is_the_model_without_its_adapter(run: RunDir) -> None:
    subject = load_subject(run.path)
    alone = load_subject(run.recipe().model.base)
    assert (subject.variants, alone.variants) == (("base", "tuned"), ("base",))
    ids = torch.arange(30)[None]

    def logits(subject: Subject, which: Any) -> torch.Tensor:
        with subject.acting_as(which) as model, torch.no_grad():
            out: torch.Tensor = model(ids).logits
        return out

    assert logits(alone, "base").dtype == torch.bfloat16
    exact = Subject(
        load_base(Path(run.recipe().model.base), dtype=torch.float32, device="cpu"), alone.encoder, False
    )
    assert torch.equal(logits(subject, "base"), logits(exact, "base"))
    assert not torch.equal(logits(subject, "tuned"), logits(exact, "base"))


def test_generate_gives_a_json_line_for_each_prompt(run: RunDir) -> None:
    got: list[dict[str, Any]] = []
    talk.generate_command(run.path, ["one", "two"], sampling=talk.Sampling(max_new_tokens=4), emit=got.append)
    assert [line["prompt"] for line in got] == ["one", "two"]
    assert got[0].keys() == {"prompt", "thinking", "content", "tool_calls", "ended", "tokens"}
    json.dumps(got)


class Scripted:
    """Answers with fixed harmony texts instead of a model's; keeps what it was shown."""

    def __init__(self, encoder: HarmonyEncoder, answers: list[str]) -> None:
        self.encoder, self.answers, self.prompts = encoder, answers, list[str]()

    def __call__(
        self, model: Any, encoder: HarmonyEncoder, prompt: list[int], *, on_token: Any, **_: Any
    ) -> Any:
        self.prompts.append(encoder.decode(prompt))
        encoder.tokenizer.encode_special_tokens = False
        ids = encoder.tokenizer.encode(self.answers.pop(0)).ids
        for token in ids:
            on_token(token)
        return ids


THINK = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>"
SAY = THINK + "final<|message|>Hello [you]!<|return|>"
CALL = THINK + "commentary to=functions.weather <|constrain|>json<|message|>{}<|call|>"


def chat(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, lines: list[str], answers: list[str]
) -> tuple[str, list[str]]:
    encoder = HarmonyEncoder.from_dir(Path(run.recipe().model.base))
    script = Scripted(encoder, answers)
    monkeypatch.setattr("finetune.evaluate.generation.generate_streaming", script)
    console = Console(file=io.StringIO(), width=100)
    typed = iter(lines)

    def read(prompt: str) -> str:
        console.print(prompt, end="", markup=False)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    talk.chat_command(run.path, setting=Setting(effort="low"), console=console, read=read)
    return console.file.getvalue(), script.prompts  # type: ignore[attr-defined]


def test_chat_keeps_the_history_as_at_inference(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, prompts = chat(run, monkeypatch, ["hi", "again", "/new", "fresh"], [SAY, SAY, SAY])
    assert "hm" in shown and "Hello [you]!" in shown
    assert "Hello [you]!<|end|>" in prompts[1] and "hm" not in prompts[1]
    assert "hi" not in prompts[2].split("<|start|>user")[1]
    assert all("Reasoning: low" in prompt for prompt in prompts)


def test_chat_commands_switch_effort_and_adapter(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["/effort high", "/base", "hi", "/tuned", "/effort extreme", "/quit", "never read"]
    shown, prompts = chat(run, monkeypatch, lines, [SAY])
    assert "Reasoning: high" in prompts[0]
    assert "base> " in shown and "now talking to the tuned model" in shown
    assert talk.HELP in shown and "never read" not in shown


def test_chat_asks_for_the_result_of_a_tool_call_and_goes_on(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, prompts = chat(run, monkeypatch, ["how warm?", "20 degrees"], [CALL, SAY])
    assert "functions.weather" in shown and "weather returns> " in shown
    assert "20 degrees" in prompts[1] and "hm" in prompts[1], "thinking of the unfinished turn stays"


def test_chat_can_give_each_answer_as_an_object_alone(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = HarmonyEncoder.from_dir(Path(run.recipe().model.base))
    monkeypatch.setattr("finetune.evaluate.generation.generate_streaming", Scripted(encoder, [CALL, SAY]))
    typed, got = iter(["how warm?", "20 degrees", "/quit"]), list[dict[str, Any]]()
    console = Console(file=io.StringIO(), width=100)
    talk.chat_command(run.path, emit=got.append, console=console, read=lambda _: next(typed))
    assert [line["prompt"] for line in got] == ["how warm?", "20 degrees"]
    assert [line["ended"] for line in got] == ["call", "return"]
    assert (got[1]["thinking"], got[1]["content"]) == ("hm", "Hello [you]!")
    assert "Hello" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_interrupted_answer_takes_the_message_back(run: RunDir) -> None:
    subject = load_subject(run.path)
    session = talk.Chat(subject, quiet(), Setting(system="Be brief."), talk.Sampling(4))

    def interrupt() -> None:
        raise KeyboardInterrupt

    session._answer = interrupt  # type: ignore[method-assign,assignment]
    session.say("hi", input)
    assert session.conversation.messages == (Message("developer", "Be brief."),)
