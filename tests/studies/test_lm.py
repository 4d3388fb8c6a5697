# SPDX-License-Identifier: Apache-2.0
"""The study of a real language model, with a tiny random one: counts, runs, plan, page."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shira import Support
from studies import runner as common
from studies import store
from studies.lm import base as bases
from studies.lm import data as texts
from studies.lm import protocol, runs
from studies.lm.plan import (
    SCREEN,
    added_at,
    at_equal_gain,
    entered,
    final_runs,
    finalists,
    level_of,
    plan,
    screened,
    tuning_runs,
)
from studies.lm.protocol import CHOICES, LOW_RANK, METHODS, SETS, SIZES, Run, arm_of, size_of
from studies.lm.train import execute, measure, row_losses
from tests.pages import ROOT, commands

CPU = arm_of("cpu")
SMALL = {"steps": 5, "batch": 2, "window": 16, "validation": 4, "test": 3, "rows": 4}


def tiny_run(method: str, target: str = "python_code", stage: str = "tuning", seed: int = 0) -> Run:
    run = CPU.run(stage, target, method, size_of(method, "small"), -6, seed)
    return replace(run, dtype="float32", **SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = {"wikitext2": "the {} rivers of the land\n", "python_code": "x = {}  # é\n"}
    for name, line in lines.items():
        (folder / "lm" / name).mkdir(parents=True)
        for part, count in (("train", 900), ("test", 40)):
            text = "".join(line.format(i * i) for i in range(count))
            (folder / "lm" / name / f"{part}.txt").write_text(text, encoding="utf-8")
    for name in SETS:
        (folder / "commonsense" / name).mkdir(parents=True)
        for part, count in (("train", 30), ("test", 9)):
            rows = [
                {"question": f"{name}: is {i} even?", "choices": ["yes", "no"], "label": i % 2}
                for i in range(count)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "commonsense" / name / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted base: a tiny random model and a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["the rivers of the land"], trainer)
    where = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(where)
    # a ninth of the real model's sizes, whose ratios DoRA's count rests on
    shape = {"hidden_size": 72, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape, **heads)).save_pretrained(where)
    return where


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_learns_with_equally_many_parameters(
    data: Path, folder: Path, method: str
) -> None:
    run = replace(tiny_run(method), steps=10, rate_exponent=-7 if method == "full" else -5)
    (result,) = execute([run], data, folder)
    assert result["target"] < result["target_before"] - 0.05
    # 2 blocks of (m + n) for q, k, v, o, gate, up, down; 4 * 1272 each
    expected = 2 * (72 * (72 + 24 + 24 + 72) + 3 * 72 * 192) if method == "full" else 2 * 4 * 1272
    lacking = expected - result["trained"]
    assert 0 <= lacking <= (2 * 264 if method == "grad+global" else 0)


def test_the_base_is_as_it_was_after_every_method(data: Path, folder: Path) -> None:
    base = bases.load(folder, "cpu", "float32")
    before = copy.deepcopy(base.state_dict())
    for method in ("full", "magnitude", "random+renewed"):
        execute([tiny_run(method)], data, folder)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    "method",
    ["full", "dora", "peft-shira", "random", "principal+renewed", "random+relative+factored"],
)
def test_runs_in_bfloat16_learn_too(data: Path, folder: Path, method: str) -> None:
    run = replace(tiny_run(method), steps=10, dtype="bfloat16")
    run = replace(run, rate_exponent=-7 if method == "full" else -5)
    (result,) = execute([run], data, folder)
    assert result["target"] < result["target_before"] - 0.05


@pytest.mark.parametrize("method", [*LOW_RANK, "peft-shira", "random", "random+relative"])
def test_values_of_adapters_are_float32_over_a_bfloat16_base(folder: Path, method: str) -> None:
    from studies.lm.methods import adapt

    base = copy.deepcopy(bases.load(folder, "cpu", "bfloat16"))
    groups = adapt(base, replace(tiny_run(method), dtype="bfloat16"), list).groups
    assert {p.dtype for group in groups for p in group["params"]} == {torch.float32}


def test_a_run_repeats_to_the_last_digit(data: Path, folder: Path) -> None:
    for method in ("lora", "random+renewed", "gallop"):
        one, two = execute([tiny_run(method)] * 2, data, folder)
        assert one["target"] == two["target"]
        (other,) = execute([tiny_run(method, seed=1)], data, folder)
        assert one["target"] != other["target"]


def test_a_tuning_run_does_not_need_the_test_files(
    data: Path, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "data")
    for path in (*tmp_path.rglob("test.txt"), *tmp_path.rglob("test.jsonl")):
        path.unlink()
    for target in ("python_code", CHOICES):
        execute([tiny_run("random", target)], tmp_path / "data", folder)
        with pytest.raises(FileNotFoundError):
            execute([tiny_run("random", target, "final")], tmp_path / "data", folder)


def test_what_is_validated_on_is_not_trained_on(data: Path, folder: Path) -> None:
    tokenizer = bases.tokenizer(folder)
    blocks, held_out = texts._blocks(data, "python_code", tokenizer, 16)
    ids = texts._encoded(data, "python_code", "train", tokenizer)
    whole = len(ids) // 256 * 256
    together = [*blocks.view(-1, 16).tolist(), *held_out.tolist()]
    assert sorted(together) == sorted(ids[:whole].view(-1, 16).tolist())
    run = replace(tiny_run("lora", CHOICES), rows=99, window=64)
    asked = texts.measured(run, data, tokenizer, CHOICES)
    assert asked.right is not None
    trained = {tuple(row.tolist()) for row in texts._trained_answers(data, tokenizer, 64).ids}
    validated = [tuple(row.tolist()) for row in asked.ids]
    assert len(trained) == 45
    assert trained < set(validated)  # all were asked for: half of them are trained on
    few = texts.measured(replace(run, rows=15), data, tokenizer, CHOICES)
    assert not trained & {tuple(row.tolist()) for row in few.ids}


def test_the_loss_of_an_answer_is_that_of_its_own_tokens(data: Path, folder: Path) -> None:
    model, tokenizer = bases.load(folder, "cpu", "float32"), bases.tokenizer(folder)
    rows = texts.measured(tiny_run("lora", CHOICES), data, tokenizer, CHOICES)
    found = row_losses(model, rows, "cpu")
    for ids, scored, loss in zip(rows.ids, rows.scored, found, strict=True):
        log = model(input_ids=ids[None]).logits[0].detach().log_softmax(-1)[-scored - 1 : -1]
        expected = -log.gather(1, ids[-scored:, None]).mean()
        assert loss == pytest.approx(float(expected), abs=1e-5)
    result = measure(model, data, tokenizer, tiny_run("lora", CHOICES))
    assert set(result["accuracy"]) == set(SETS)
    assert rows.right is not None
    assert result["target"] == pytest.approx(
        sum(loss for loss, right in zip(found, rows.right, strict=True) if right) / 12, abs=1e-5
    )


class TestRenewal:
    def adapted(self, folder: Path) -> Any:
        from shira import ShiraConfig, get_peft_model
        from studies.lm.methods import TARGETS

        base = copy.deepcopy(bases.load(folder, "cpu", "float32"))
        return get_peft_model(base, ShiraConfig(r=2, random_seed=0, target_modules=TARGETS))

    def test_without_renewal_it_is_adamw(self) -> None:
        from studies.lm.renew import EntryAdamW

        torch.manual_seed(0)
        one = torch.nn.Parameter(torch.randn(50))
        two = torch.nn.Parameter(one.detach().clone())
        ours, theirs = EntryAdamW([one], lr=0.1), torch.optim.AdamW([two], lr=0.1, weight_decay=0)
        for _ in range(20):
            one.grad = torch.randn(50)
            two.grad = one.grad.clone()
            ours.step(), theirs.step()
        torch.testing.assert_close(one, two)

    def test_the_smallest_go_and_the_largest_gradients_come(self, folder: Path) -> None:
        from studies.lm.renew import EntryAdamW, candidates, layers_of, renew

        model = self.adapted(folder)
        values = [p for p in model.parameters() if p.requires_grad]
        optimizer = EntryAdamW(values, lr=1e-2, warmup_steps=4)
        ids = torch.arange(40).view(2, 20)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
        for _ in range(2):
            with candidates(model, "default", 0.25) as grown:
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        name, layer = layers_of(model)[3]
        old, deltas = layer.support("default"), layer.shira_weight["default"].detach().clone()
        assert len(set(grown[name].tolist()) & set(old.indices.tolist())) == 0
        parameter = layer.shira_weight["default"]
        renew(model, "default", optimizer, grown)
        new = layer.support("default")
        drop = len(grown[name])
        assert new.nnz == old.nnz
        assert drop == old.nnz // 4
        stayed = set(old.indices.tolist()) & set(new.indices.tolist())
        kept = deltas.abs().topk(old.nnz - drop).indices
        assert stayed == set(old.indices[kept].tolist())
        at = {i: n for n, i in enumerate(new.indices.tolist())}
        for n, i in enumerate(old.indices.tolist()):
            if i in at:
                assert parameter[at[i]] == deltas[n]
                assert optimizer.state[parameter]["steps"][at[i]] == 2
        fresh = [at[i] for i in grown[name].tolist()]
        assert not parameter.detach()[fresh].any()
        assert not optimizer.state[parameter]["warm"][fresh].any()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert parameter.detach()[fresh].abs().max() <= 1e-2 / 4 * 1.001
        after = {n: p for n, p in model.named_parameters() if "base_layer" in n}
        assert all(torch.equal(before[n], after[n]) for n in before)

    def test_candidates_are_the_largest_of_the_dense_gradient(self, folder: Path) -> None:
        from studies.lm.renew import candidates, layers_of

        model = self.adapted(folder)
        ids = torch.arange(40).view(2, 20)
        with candidates(model, "default", 0.5) as grown:
            model(input_ids=ids, labels=ids).loss.backward()
        plain = copy.deepcopy(bases.load(folder, "cpu", "float32"))
        name, layer = layers_of(model)[5]
        weight = plain.get_submodule(name.removeprefix("base_model.model.")).weight
        weight.requires_grad_(True)
        plain(input_ids=ids, labels=ids).loss.backward()
        score = weight.grad.abs().flatten()
        score[layer.support("default").indices.long()] = -1
        expected = score.topk(len(grown[name])).indices
        assert len(set(expected.tolist()) - set(grown[name].tolist())) <= 2  # last digits


def test_principal_entries_are_those_of_the_low_rank_part() -> None:
    from studies.lm.scores import principal

    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 60, bias=False)
    low = torch.randn(60, 4) @ torch.randn(4, 80)
    layer.weight.data = low + 1e-3 * torch.randn(60, 80)
    support = principal(layer, 2)
    assert isinstance(support, Support)
    largest = low.abs().flatten().topk(2 * 140).indices.tolist()
    assert len(set(largest) & set(support.indices.tolist())) > 2 * 140 * 0.97


def test_global_ranks_follow_the_scores_and_keep_the_budget() -> None:
    from studies.lm.scores import global_ranks

    torch.manual_seed(0)
    shapes = {"even": (40, 40), "other": (40, 20), "peaked": (40, 40)}
    scores = {f"{name}.weight": torch.rand(shape) + 1 for name, shape in shapes.items()}
    scores["peaked.weight"].view(-1)[:700] *= 100
    ranks = global_ranks(scores, 3)
    # under one threshold all 660 entries would be in one layer: 8 of its ranks
    assert ranks == {"even": 1, "other": 1, "peaked": 6}
    assert sum(rank * sum(shapes[name]) for name, rank in ranks.items()) <= 3 * (80 + 60 + 80)


def best_exponent(method: str) -> int:
    """Where the made-up losses of a method are lowest: within its grid, or one beyond it."""
    return min(protocol.GRIDS[method]) + len(method) % 5 - 1


def losses(run: Run) -> tuple[float, float]:
    """Made-up losses of target and source."""
    away = run.rate_exponent - best_exponent(run.method)
    return 4 + len(run.method) / 100 + abs(away) / 10 + run.seed / 1000, 6 + away / 10


def fake(run: Run) -> dict[str, Any]:
    target, source = losses(run)
    found: dict[str, Any] = {"target": target, "source": source, "seconds": 0.0}
    if run.stage == "final":
        found["strengths"] = {
            str(share): [6 + share * (target - 6), 4 + share * (source - 4)]
            for share in protocol.STRENGTHS
        }
    found |= {"target_before": 6.0, "source_before": 4.0, "base_sha256": "b", "trained": 1}
    if run.target == CHOICES:
        found |= dict.fromkeys(("accuracy", "accuracy_before"), dict.fromkeys(SETS, 0.5))
    return found


@pytest.fixture(scope="module")
def everything() -> runs.Done:
    done: dict[str, store.Done[Run]] = {}
    while left := plan(done, CPU).runs:
        done |= {run.key: store.Done(run, fake(run)) for run in left}
    return done


def test_the_plan_begins_with_the_look_goes_beyond_edges_and_ends(everything: runs.Done) -> None:
    empty = plan({}, CPU)
    assert len(empty.look) == 16
    assert not empty.final
    assert {run.target for run in empty.runs} == {*SCREEN}
    assert plan(everything, CPU).missing == 0
    for method in METHODS:
        assert screened(everything, CPU, method)[1] == best_exponent(method)
    assert plan(everything, arm_of("cuda")).missing == empty.missing


def test_the_best_on_the_target_and_on_the_source_enter_the_finals(everything: runs.Done) -> None:
    for size in SIZES:
        chosen = finalists(everything, CPU, size)
        assert chosen is not None
        assert chosen[:4] == ["lora", "rslora", "grad", "block"]  # the shortest names
        assert len(chosen) == 5
    made = [entry.run for entry in everything.values() if entry.run.stage == "final"]
    assert len(made) == 2 * len(final_runs(everything, CPU, "small", chosen)) == 2 * 5 * 5 * 5
    assert {run.size for run in made} == set(SIZES)
    small = finalists(everything, CPU, "small")
    assert entered(everything, CPU, "large") == [*dict.fromkeys((*LOW_RANK, *small))]
    assert len(entered(everything, CPU, "small")) == len(LOW_RANK) + 4
    assert entered({}, CPU, "small") is entered({}, CPU, "large") is None


def test_only_those_that_enter_are_tuned_on_all_targets(everything: runs.Done) -> None:
    tuning = [entry.run for entry in everything.values() if entry.run.stage == "tuning"]
    assert {run.method for run in tuning if run.target in SCREEN} == {*METHODS}
    elsewhere = {run.method for run in tuning if run.target not in SCREEN}
    assert elsewhere == {*entered(everything, CPU, "small")}
    assert all(run.size == "small" for run in tuning if run.target not in SCREEN)


def test_rates_tried_after_the_screen_do_not_change_who_entered(everything: runs.Done) -> None:
    before = entered(everything, CPU, "small")
    assert before is not None
    against = ("lora", best_exponent("lora"))
    for method in protocol.SPARSE:
        if at_equal_gain(everything, CPU, method, "small", *SCREEN, against) is None:
            break  # no rate of the screen has less than that gain
    assert method not in before
    low = min(screened(everything, CPU, method)[0]) - 1
    (run,) = tuning_runs(CPU, method, "small", low, SCREEN)
    made = store.Done(run, {**fake(run), "target": 4.4, "source": 3.0})  # which would be the best
    later = {**everything, run.key: made}
    assert at_equal_gain(later, CPU, method, "small", *SCREEN, against) is not None
    assert entered(later, CPU, "small") == before


def test_strengths_give_a_curve_to_compare_on(everything: runs.Done) -> None:
    from studies.lm import tables

    run = final_runs(everything, CPU, "small", ["block"])[0]
    curve = tables.strengths(everything, run)
    assert [*curve] == [0.0, *protocol.STRENGTHS, 1.0]
    assert curve[0.0] == (6.0, 4.0)
    # a line from the base: at 85 % of lora's gain it adds as much as its share of its own gain
    reference = final_runs(everything, CPU, "small", ["lora"])[0]
    goal, own = (6.0 - losses(each)[0] for each in (reference, run))
    added = added_at(level_of(everything, reference), curve, 4.0)
    assert added == pytest.approx((losses(run)[1] - 4) * 0.85 * goal / own)


def test_what_is_forgotten_is_compared_at_equal_gain(everything: runs.Done) -> None:
    # lora's best target loss is 4.04 of 6.0 before: 85 % of its gain is at 4.334
    against = ("lora", best_exponent("lora"))
    for method in ("random", "lora"):
        best = best_exponent(method)
        lower = best - (4.334 - 4 - len(method) / 100) * 10
        expected = 6 + (lower - best) / 10 - 4
        found = at_equal_gain(everything, CPU, method, "small", *SCREEN, against)
        if lower < min(protocol.GRIDS[method]):
            assert found is None
        else:
            assert found == pytest.approx(expected)


def test_a_rate_at_which_the_loss_is_not_finite_is_not_chosen(everything: runs.Done) -> None:
    best = screened(everything, CPU, "random")[1]
    assert best is not None
    (run,) = tuning_runs(CPU, "random", "small", best, SCREEN)
    lost = store.Done(run, {**fake(run), "target": None, "source": None})
    assert screened({**everything, run.key: lost}, CPU, "random")[1] not in (best, None)


def test_the_runner_goes_on_after_a_failure_and_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = True

    def made_up(_: str, batched: bool, given: Any, made: tuple[Run, ...], data: Path) -> Any:
        assert batched
        assert given == {"base_folder": tmp_path}
        if broken and any(run.method == "random" for run in made):
            raise ValueError("no such mask")
        return [fake(run) for run in made], {}

    monkeypatch.setattr(common, "execute", made_up)
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    monkeypatch.setattr("os.fsync", lambda _: None)

    def go_on() -> int:
        return runs.STUDY.continue_runs(
            lambda done: plan(done, CPU).look, tmp_path, jobs=2, minutes=None,
            folder=tmp_path, together=3, base_folder=tmp_path,
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="4 runs failed, 12 were made"):
        go_on()
    assert len(runs.load(tmp_path)) == 12
    broken = False
    assert go_on() == 4
    assert not plan(runs.load(tmp_path), CPU).look


def test_runs_of_two_bases_are_refused(tmp_path: Path) -> None:
    one, two = plan({}, CPU).look[:2]
    store.append(one, fake(one), {}, tmp_path)
    store.append(two, {**fake(two), "base_sha256": "other"}, {}, tmp_path)
    with pytest.raises(ValueError, match="several base models"):
        runs.load(tmp_path)


def test_what_is_packed_is_put_together_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm"
    package.mkdir()
    content = bytes(range(256)) * 10
    (package / bases.GGUF).write_bytes(content)
    monkeypatch.setattr(bases, "_package", lambda name: package)
    monkeypatch.setattr(bases, "FIRST_PART", 1000)
    monkeypatch.setattr(bases, "TEXTS", ("python_code",))
    one, two = bases.pack(data, tmp_path / "parts")
    assert not texts.absent(one / "data", "python_code")
    assert not texts.absent(one / "data", CHOICES)
    assert bases._joined(tmp_path / "parts", tmp_path).read_bytes() == content
    assert (two / bases.GGUF).stat().st_size == len(content) - 1000


def test_tables_show_the_seeds_that_all_methods_made(everything: runs.Done) -> None:
    from studies.lm import tables

    whole = tables.finals(everything, CPU)
    assert "| block | small | 5 | 4.053 ± " in whole
    last = [e.run for e in everything.values() if (e.run.stage, e.run.seed) == ("final", 3)][-1]
    without = {key: entry for key, entry in everything.items() if key != last.key}
    assert f"| block | {last.size} | 4 | 4.053 ± " in tables.finals(without, CPU)
    assert "-0.0" not in tables.paired({}, CPU)
    nothing = [tables.finals({}, CPU), tables.paired({}, CPU), tables.tuning({}, CPU)]
    assert "±" not in "".join(nothing)
    # lora has 4.043 and adds 2; block has 4.053 and adds 2, which is a little more at equal gain
    row = next(r for r in tables.paired(everything, CPU).splitlines() if "| block | small " in r)
    more = [share * 2 * (1.957 / 1.947 - 1) for share in tables.GAINS]
    cells = [f"{value:+.3f} ± 0.000" for value in (0.01, *more)]
    assert row == f"| block | small | 5 | lora | {' | '.join(cells)} |"
    row = next(r for r in whole.splitlines() if "| block | small " in r)
    added = protocol.GAIN * 2 * 1.957 / 1.947
    assert f" | 2.000 ± 0.000 | {added:.3f} ± 0.000 | " in row


def test_of_an_incomplete_screen_no_figure_is_shown(everything: runs.Done) -> None:
    from studies.lm import tables

    assert "| magnitude | 5 | 0.0215 | 4.090 | 6.000 | +1.756 |" in tables.screen(everything, CPU)
    (full,) = tuning_runs(CPU, "full", "small", min(protocol.GRIDS["full"]), SCREEN)
    other = store.Done(full, {**fake(full), "target_before": 6.5})  # in float32
    assert "| the base |  |  | 6.000 | 4.000 |" in tables.screen(
        everything | {full.key: other}, CPU
    )
    (one,) = tuning_runs(CPU, "magnitude", "small", min(protocol.GRIDS["magnitude"]), SCREEN)
    done = {key: entry for key, entry in everything.items() if key != one.key}
    assert "| magnitude | 3 | - | - | - | - | - |" in tables.screen(done, CPU)
    # nor is LoRA's gain known before its own screen is complete
    (one,) = tuning_runs(CPU, "lora", "small", min(protocol.GRIDS["lora"]), SCREEN)
    done = {key: entry for key, entry in everything.items() if key != one.key}
    assert "| magnitude | 5 | 0.0215 | 4.090 | 6.000 | - | - |" in tables.screen(done, CPU)


def test_a_share_is_told_of_more_than_nothing() -> None:
    from studies.lm.tables import _share

    assert _share(0.1, 0.2) == "0.50"
    for ours, theirs in ((0.1, None), (0.1, 0.0), (0.1, -0.2), (math.inf, math.inf)):
        assert _share(ours, theirs) == "-"


def test_the_page_is_what_the_committed_runs_give(tmp_path: Path) -> None:
    from studies.lm import document

    shutil.copy(document.DOCS / document.PAGE, tmp_path)
    document.rebuild(tmp_path)
    written = (tmp_path / document.PAGE).read_text()
    assert written == (document.DOCS / document.PAGE).read_text(), "run `make study`"


def test_the_commands_of_the_page_do_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from studies.lm import document
    from studies.lm.__main__ import main

    monkeypatch.setattr(document, "rebuild", lambda: [])
    shown = commands(ROOT / "docs" / "study-lm.md")
    assert shown[0] == "make study"
    planned = subprocess.run(
        ["make", "--no-print-directory", "-n", "study"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert planned.stdout.rstrip().endswith("-m studies.lm")
    for line in shown[1:]:
        words = line.split()
        given = words[words.index("studies.lm") + 1 :]
        if given[0] == "pack":
            continue
        assert main([*given, "--data", "/nowhere"]) == 0, line


def test_committed_runs_name_what_they_were_made_with() -> None:
    for entry in runs.load().values():
        assert math.isfinite(entry.result["seconds"])
    for path in runs.STUDY.results.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert json.loads(line)["environment"]["versions"]["torch"]


def test_part_of_an_adapter_is_part_of_what_it_adds_to_the_weights(
    data: Path, folder: Path
) -> None:
    """Half of LoRA's and SHiRA's weights' change; and all of it again afterwards."""
    from studies.lm.methods import adapt
    from studies.lm.train import Training, fit

    tokenizer = bases.tokenizer(folder)
    for method in ("lora", "random", "full"):
        run = tiny_run(method)
        torch.manual_seed(0)
        adapted = adapt(copy.deepcopy(bases.load(folder, "cpu", "float32")), run, list)
        training = Training(adapted, run, texts.batches(run, data, tokenizer, "training", 5))
        fit([training])

        def weight(model: Any = training.model) -> torch.Tensor:
            merged = copy.deepcopy(model)
            merged = merged.merge_and_unload() if hasattr(merged, "merge_and_unload") else merged
            return merged.model.layers[1].mlp.up_proj.weight.detach().clone()

        base = bases.load(folder, "cpu", "float32").model.layers[1].mlp.up_proj.weight
        whole = weight()
        assert (whole - base).abs().max() > 1e-4
        with training.at(0.5):
            torch.testing.assert_close(weight() - base, (whole - base) / 2, rtol=1e-3, atol=1e-6)
        assert torch.equal(weight(), whole)


@pytest.mark.gpu
def test_a_step_as_a_graph_is_the_step(data: Path, folder: Path) -> None:
    from studies.lm.methods import adapt
    from studies.lm.train import Training, fit

    tokenizer = bases.tokenizer(folder)
    for method in ("lora", "random", "random+renewed", "block"):
        run = replace(tiny_run(method), device="cuda", steps=20)
        found = []
        for captured in (True, False):
            torch.manual_seed(0)
            adapted = adapt(copy.deepcopy(bases.load(folder, "cuda", "float32")), run, list)
            training = Training(adapted, run, texts.batches(run, data, tokenizer, "training", 20))
            training.captured = captured
            found.append(torch.tensor(fit([training])[0]))
        torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)
