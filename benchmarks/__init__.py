# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: shira beside PEFT's SHiRA, PEFT's LoRA and the frozen floor.

Run them with ``make bench`` or ``python -m benchmarks [SUITE] [--option ...]``. A suite is a file::

    training.py     one training step: seconds and peak memory
    kernel.py       the weight gradient of one layer, every backend, beside the machine's roofline
    growth.py       a step's time and memory over density, tokens, width and depth
    masks.py        making the masks: seconds for a layer and for a model
    mixed_batch.py  one batch, several adapters: seconds of a forward pass
    switching.py    from one adapter to another: seconds, and whether the base comes back
    merging.py      into a checkpoint on disk and back: seconds and peak memory
    fusing.py       two adapters made one, and compared
    serving.py      vLLM's server with shira's plugin and with LoRA: requests a second, latency
    gpu.py          one training step of a 3-billion-parameter model on a CUDA device
    gpu_adapters.py switching, masks and mixed batches there

    contenders.py   the models that the training suite compares; gpu_contenders.py on a GPU
    gpu_kernels.py  the weight gradient alone, on a GPU; gpu_answers.py whether all agree;
                    gpu_expected.py what each should take
    gpu_session.py  make gpu: all that waits for a GPU, part after part
    memory.py       peak memory of a step, each contender in a process of its own
    roofline.py     what this machine's cache, memory and arithmetic allow (roofline.c)
    timing.py       interleaved timing and the statistics of its ratios
    environment.py  hardware and versions
    report.py       JSON files and tables; python -m benchmarks.report makes one page of all
    page.py         that page; panels.py is what it draws of each suite, figures.py how

Rules that all suites keep: the answers are compared before anything is timed; contenders take
turns inside one run, so that a slow minute of the machine hits them all; what is reported is the
ratio with its spread, and all samples are in the file; what was not run is null, never a guess.
"""
