# SPDX-License-Identifier: Apache-2.0
"""What a reader of docs/serving.md has on his disk, and how he asks his server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx

from tests.serve.engine.zoo import PROMPTS, TOKENS

PAGE = Path(__file__).parents[3] / "docs" / "serving.md"
FLAGS = "--dtype float32 --enforce-eager --max-model-len 256 --kv-cache-memory-bytes 67108864"


def commands(title: str) -> list[str]:
    """The commands of the section whose heading has the words."""
    (section,) = [s for s in PAGE.read_text().split("\n## ") if title in s.partition("\n")[0]]
    return re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)


def lay_out(zoo, folder: Path) -> None:
    """The model and the two adapters that the page names."""
    shutil.copytree(zoo.base, folder / "base-model")
    save_tokenizer(folder / "base-model")
    shutil.copytree(zoo.path("a"), folder / "adapters" / "french")
    shutil.copytree(zoo.path("b"), folder / "adapters" / "german")


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "the", "weather", "today"]
    vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(6, 250))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)


def fork_engines(packages: Path) -> None:
    """Have a server with this folder on its path fork its engine: as `conftest.forked`, and why."""
    (packages / "sitecustomize.py").write_text(
        "import multiprocessing\n"
        "real = multiprocessing.get_context\n"
        "multiprocessing.get_context = lambda how=None: real('fork' if how == 'spawn' else how)\n"
    )


class Guide:
    """What a reader of the guide has before him after the first command."""

    def __init__(self, port: int, folder: Path, env: dict[str, str], process) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.port, self.folder, self.env = port, folder, env

    def shell(self, command: str):
        command = command.replace("localhost:8000", f"127.0.0.1:{self.port}")
        out = subprocess.run(
            ["bash", "-euc", command], cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout)

    def post(self, route: str, **fields):
        return httpx.post(self.url + route, json=fields, timeout=60)

    def listed(self):
        return httpx.get(f"{self.url}/v1/shira_adapters").json()


STATES = {"french": "a", "german": "b", "mix": "both", "base-model": "base"}


async def ask(client, model, prompt, *, stream=False, tokens=TOKENS):
    body = {
        "model": model,
        "prompt": PROMPTS[prompt],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": stream,
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    if not stream:
        value = response.json()
        return value["model"], value["choices"][0]["token_ids"]
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    parts = [json.loads(event) for event in events]
    tokens = [t for part in parts for c in part["choices"] for t in c["token_ids"]]
    return parts[0]["model"], tokens
