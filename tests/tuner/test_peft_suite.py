# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests, pointed at our classes: its SHiRA cases, and LoRA's where we do as LoRA does.

They are in PEFT's source distribution, which ``make test-peft`` unpacks into ``.venv/peft-tests``.
Of each test one case is run: the first of one test, the second of the next, and so on.
``SHIRA_WHOLE_SUITE=1`` runs all of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / ".venv" / "peft-tests" / f"peft-{peft.__version__}" / "tests"
HELPERS = ("testing_common.py", "testing_utils.py")

# LoRA's cases of layers, as ours.
LAYERS = [
    ("Conv1d", {"density": 0.5, "target_modules": ["conv1d"]}),
    ("Conv1dBigger", {"r": 1, "target_modules": ["conv1d"]}),
    ("Conv1dGroups", {"r": 1, "target_modules": ["conv1d"]}),
    ("Conv2d", {"r": 1, "target_modules": ["conv2d", "lin0"]}),
    ("Conv2dGroups", {"r": 1, "target_modules": ["conv2d"]}),
    ("Conv3d", {"r": 1, "target_modules": ["conv3d"]}),
    ("Conv3d", {"r": 1, "target_modules": ["conv3d", "lin0"]}),
    ("MHA", {"r": 1, "target_modules": ["mha", "lin0"]}),
]

LORAS_INSIDE = "it looks into LoRA's layers: "
EXPECTED_FAILURES = {
    "test_rank_pattern_for_moe_target_parameters": LORAS_INSIDE + "lora_A and lora_B",
    "test_target_multiple_parameters_on_same_module": LORAS_INSIDE + "its ParamWrapper",
    "test_target_parameter_result_caching_works": LORAS_INSIDE + "its dense delta, made once",
    "test_adding_second_adapter_reuses_param_wrapper": LORAS_INSIDE + "its ParamWrapper",
    "test_target_parameters_forward_under_autocast": LORAS_INSIDE + "_LoraFactorsProxy",
    "test_targeting_module_and_targeting_param_equivalent": "it loads a model from the hub",
    "test_target_parameters_works_with_existing_parametrization": (
        "a parametrized parameter is refused: what is put in its place would not be read"
    ),
}

CONFTEST = """
import os, re
import pytest
import shira

shira.ShiraConfig  # puts our classes in the place of PEFT's
FAILURES = {failures!r}
WHOLE = {whole!r}


def pytest_configure(config):
    for name in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", name)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    cases = {{}}
    for item in items:
        ours = "shira" in item.nodeid.lower() or "target_parameters" in item.nodeid
        if ours:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = []
    for number, (_, found) in enumerate(sorted(cases.items())):
        kept += found if WHOLE else [found[number % len(found)]]
    items[:] = kept
    for item in items:
        if reason := FAILURES.get(item.originalname):
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
"""

LORAS_PLACE = '''
from shira import ShiraConfig


class LoraConfig(ShiraConfig):
    """Makes a ShiraConfig of LoRA's options."""

    def __new__(cls, **options):
        options = {name: value for name, value in options.items() if name not in OF_LORA}
        if "init_lora_weights" in options:
            options["init_weights"] = options.pop("init_lora_weights")
        return ShiraConfig(**{**options, "r": 2})


OF_LORA = {"lora_alpha", "lora_dropout", "bias"}
'''


def custom_models(text: str, folder: Path) -> str:
    """Add LoRA's cases of layers to the cases of SHiRA."""
    cases = [
        f'    ("{kind} {i} SHiRA", "{kind}", ShiraConfig, {options!r}),\n'
        for i, (kind, options) in enumerate(LAYERS)
    ]
    place = '    ("Vanilla MLP 1 SHiRA"'
    assert place in text
    return text.replace(place, "".join(cases) + place)


def target_parameters(text: str, folder: Path) -> str:
    """Put our configuration in the place of LoRA's, and random models in that of the hub's."""
    save_mixtures(folder)
    (folder / "tests" / "loras_place.py").write_text(LORAS_PLACE)
    theirs = "from peft import LoraConfig, PeftModel"
    wrapper = "from peft.tuners.lora.layer import ParamWrapper"
    assert theirs in text
    assert wrapper in text
    text = text.replace(theirs, "from .loras_place import LoraConfig\nfrom peft import PeftModel")
    ours = "from shira.tuner.parameter import ParameterLayer as ParamWrapper"
    return text.replace(wrapper, ours).replace('"trl-internal-testing/', f'"{folder}/')


def save_mixtures(folder: Path) -> None:
    """Save random models of the classes that the tests load from the hub."""
    import torch
    import transformers

    sizes = {
        "vocab_size": 1000,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "pad_token_id": 0,
        "max_position_embeddings": 128,
    }
    of_llama4 = {"intermediate_size_mlp": 32, "head_dim": 4, "num_experts_per_tok": 1}
    of_llama4["interleave_moe_layer_step"] = 1
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, **of_llama4))
    for parameter in model.parameters():  # its experts are left as they are in memory
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "tiny-Llama4ForCausalLM")
    config = transformers.GptOssConfig(**sizes, head_dim=8, num_experts_per_tok=2)
    transformers.GptOssForCausalLM(config).save_pretrained(folder / "tiny-GptOssForCausalLM")


FILES = {
    "test_shira.py": None,
    "test_custom_models.py": custom_models,
    "test_target_parameters.py": target_parameters,
}


@pytest.mark.slow
@pytest.mark.skipif(
    not TESTS.is_dir(), reason=f"no tests of PEFT {peft.__version__}: make test-peft"
)
def test_pefts_own_suite(tmp_path):
    folder, whole = tmp_path / "tests", bool(os.environ.get("SHIRA_WHOLE_SUITE"))
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in HELPERS:
        (folder / name).write_text((TESTS / name).read_text())
    for name, change in FILES.items():
        text = (TESTS / name).read_text()
        (folder / name).write_text(change(text, tmp_path) if change else text)
    text = CONFTEST.format(failures=EXPECTED_FAILURES, whole=whole)
    (folder / "conftest.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfEx", "tests"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    told = ran.stdout[-4000:]
    assert ran.returncode == 0, told + ran.stderr[-2000:]
    passed, failed = (int(n) for n in re.search(r"(\d+) passed.* (\d+) xfailed", told).groups())
    assert passed > 80
    assert failed == len(EXPECTED_FAILURES)
    print(told.strip().splitlines()[-1])
