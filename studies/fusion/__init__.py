# SPDX-License-Identifier: Apache-2.0
"""What is left of each of three tasks when their adapters are fused into one.

    protocol             what is compared
    runs                 the runs made, and those wanted
    adapters             three adapters in one model: training, fusing, how they overlap
    measure              one run: figures before and after each way of fusing
    tables, document     the committed runs as tables, in docs/study-fusion.md

It stands on `studies.accuracy`: its tasks, model, loop and tuned rates.
``python -m studies.fusion`` rebuilds the page, ``run`` makes missing runs first.
"""
