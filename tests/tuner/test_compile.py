# SPDX-License-Identifier: Apache-2.0
"""What torch.compile, torch.export and CUDA graphs make of an adapted layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shira import ShiraConfig, get_peft_model

from .models import randomize

IN, OUT = 24, 40


def adapted(device="cpu", **config):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))
    model = get_peft_model(
        base, ShiraConfig(r=2, target_modules=["0", "2"], random_seed=0, **config)
    )
    randomize(model)
    return model.to(device).base_model.model


def test_the_compiled_graphs_make_nothing_of_the_weights_size():
    """No break (fullgraph), and no clone, copy or gradient of a weight in either graph."""
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    model = adapted()
    x = torch.randn(3, IN, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    compiled(x).square().sum().backward()
    assert len(graphs) == 2
    calls = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("shira.linear" in str(node.target) for node in calls) == 4
    made = [
        tensor
        for node in calls
        for tensor in torch.utils._pytree.tree_leaves(node.meta.get("val"))
        if isinstance(tensor, torch.Tensor) and tensor.numel() >= IN * OUT
    ]
    assert made == []


def test_exported():
    model = adapted().eval()
    x = torch.randn(3, IN)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("config", [{}, {"mask_type": "block", "mask_options": {"block_size": 8}}])
def test_cuda_graph(config):
    """A captured step follows the values and leaves the weights as they were."""
    model = adapted("cuda", **config)
    x = torch.randn(3, IN, device="cuda")
    values = [p for p in model.parameters() if p.requires_grad]
    before = {n: p.clone() for n, p in model.named_parameters() if "shira_weight" not in n}

    def step():
        for value in values:
            value.grad = None
        out = model(x)
        out.square().sum().backward()
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    captured = [value.grad for value in values]
    with torch.no_grad():
        x.normal_()
        for value in values:
            value.mul_(-1.5)
    graph.replay()
    got = out.clone(), [grad.clone() for grad in captured]
    want = step()
    torch.testing.assert_close(got[0], want)
    for grad, value in zip(got[1], values, strict=True):
        torch.testing.assert_close(grad, value.grad)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
