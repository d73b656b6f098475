"""Trials in one batch: a killed run goes on as if nothing had been, and trials end by themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import llama

from benchmarks.many_trials import figure, grid, results_table
from benchmarks.trials import Progress, Trial, TrialRun

TRIALS = [Trial("a", "x", r=2, learning_rate=1e-2, lora_dropout=0.2), Trial("b", "y", r=5, learning_rate=1e-3, seed=1)]


def batches(trial: Trial, steps: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(ord(trial.corpus[0]))
    return [torch.randint(0, 64, (1, 8), generator=g) for _ in range(steps)]


def start(out=None, trials=TRIALS, steps=6, **options) -> TrialRun:
    model = llama().train()
    judge = torch.arange(24).view(3, 8)
    return TrialRun(model, trials, lambda t: batches(t, steps), lambda t: list(judge), out=out, interval=2, **options)


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch) -> None:
    whole = start(tmp_path / "whole")
    whole.run()
    killed = start(tmp_path / "killed")
    step, count = TrialRun._step, []

    def dying(self, names) -> None:
        count.append(names)
        if len(count) == 4:  # after the checkpoint of step 2, before that of step 4
            raise KeyboardInterrupt
        step(self, names)

    monkeypatch.setattr(TrialRun, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    monkeypatch.setattr(TrialRun, "_step", step)
    again = start(tmp_path / "killed")
    assert [len(progress.losses) for progress in again.progress.values()] == [2, 2]
    again.run()
    assert again.progress == whole.progress
    for name in ("a", "b"):
        for one, other in zip(whole.bank.parameters(name), again.bank.parameters(name), strict=True):
            assert torch.equal(one, other)
        assert [path.name for path in (tmp_path / "killed" / name).iterdir()] == ["step-000006"]


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path, monkeypatch) -> None:
    run = start(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run.run()
    assert not list(tmp_path.glob("*/*"))
    assert [len(progress.losses) for progress in start(tmp_path).progress.values()] == [0, 0]


def test_what_a_killed_run_was_writing_is_cleared_away(tmp_path) -> None:
    half = tmp_path / "a" / ".step-000002.123"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert not start(tmp_path).progress["a"].losses and not half.exists()


def test_checkpoints_are_pefts(tmp_path) -> None:
    from peft import PeftModel

    run = start(tmp_path, steps=2)
    run.run()
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        own = run.model.eval()(input_ids=ids, adapters=["a"]).logits
        theirs = PeftModel.from_pretrained(llama(), tmp_path / "a" / "step-000002").eval()(input_ids=ids).logits
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-4)


def test_another_trials_folder_is_refused(tmp_path) -> None:
    start(tmp_path, steps=2).run()
    with pytest.raises(ValueError, match="choose another folder"):
        start(tmp_path, [Trial("a", "x", r=2, learning_rate=1e-3)])


def test_trials_that_do_not_fit_one_batch_take_turns_and_learn_the_same() -> None:
    together, apart = start(), start(max_tokens=8)
    for (_, a), (_, b) in zip(together.run().items(), apart.run().items(), strict=True):
        torch.testing.assert_close(torch.tensor(a.losses), torch.tensor(b.losses), rtol=1e-4, atol=0)


def test_a_trial_that_gets_no_better_ends_and_the_others_go_on() -> None:
    hopeless = Trial("hopeless", "x", learning_rate=0.0, lora_dropout=0.0, patience=1)
    progress = start(trials=[hopeless, TRIALS[1]]).run()
    assert progress["hopeless"].ended == "no better for 1 evaluations" and len(progress["hopeless"].losses) == 4
    assert progress["b"].ended == "all steps done" and len(progress["b"].losses) == 6


def test_patience_counts_evaluations() -> None:
    progress = Progress(held_out=[[1, 3.0], [2, 2.0], [3, 2.5], [4, 2.1]])
    assert progress.best == 2.0
    assert [progress.impatient(patience) for patience in (0, 1, 2, 3, 4)] == [False, True, True, False, False]


def test_the_grid_its_table_and_its_figure() -> None:
    trials = {trial.name: trial for trial in grid([4, 8], [1e-3, 2e-3], "comedies")}
    assert list(trials) == ["r4-lr0.001", "r4-lr0.002", "r8-lr0.001", "r8-lr0.002"]
    progress = {name: Progress([3.0], [[1, 3.0 - i]], "all steps done") for i, name in enumerate(trials)}
    table = results_table(trials, progress).splitlines()
    assert table[2].startswith("r8-lr0.002") and len(table) == 6
    picture = figure(progress, "title")
    assert picture is None or len(picture.axes[0].lines) == 4
