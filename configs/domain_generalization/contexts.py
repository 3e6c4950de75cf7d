"""Digits in domains, each held out in turn: four visual contexts, or the rotations of RotatedMNIST.

  python -m launch.prepare_data mnist --source DIR
  python -m launch.train --config configs/domain_generalization/contexts.py:cpu,vrex --workdir runs/vrex
  python -m launch.model_selection runs/vrex

A stage for each held-out domain. Arguments, in this order: the size; the method, see METHODS in methods.py;
`contexts` or `rotations`; the trial, 0 to 19, the seed of DomainBed's splits; `single` held-out domains, or
`pairs` too, which selection by leaving one domain out needs.

`cpu`: 1,250 digits a domain, of which 1,000 are trained on, 14×14, an MLP, 700 steps of 21 digits a domain;
DecAug and ERM on its head with SGD, the others with Adam. `paper`: 12,000 digits a domain (10,000 of
rotations), 28×28, the protocol of DomainBed.
"""

import itertools

from ml_collections import ConfigDict

from configs.arguments import check
from configs.domain_generalization import methods
from configs.domain_generalization.methods import prefix

CONTEXTS = ("plain", "inverted", "noisy", "low_contrast")
DEGREES = (0, 15, 30, 45, 60, 75)


def get_config(size="cpu", method="erm", domains="contexts", trial="0", held_out="single"):
    check(size, ("cpu", "paper"), "size")
    check(domains, ("contexts", "rotations"), "kind of domains")
    check(held_out, ("single", "pairs"), "held-out domains")
    trial = int(check(trial, [str(i) for i in range(20)], "trial"))
    paper = size == "paper"
    stride = 1 if paper else 2

    def digits(index, count):
        rows = f"train[{index * count}:{(index + 1) * count}]"
        return dict(name="store.arrays", dataset="mnist", split=rows)

    if domains == "contexts":
        sections = {
            context: prefix(
                "digit_domains.in_context",
                dataset=digits(index, 12_000 if paper else 1250),
                context=context,
                stride=stride,
                seed=index,
            )
            for index, context in enumerate(CONTEXTS)
        }
    else:
        sections = {
            f"degrees_{degrees}": prefix(
                "digit_domains.in_context",
                dataset=prefix(
                    "digit_domains.rotated", dataset=digits(index, 10_000 if paper else 1250), degrees=degrees
                ),
                context="plain",
                stride=stride,
            )
            for index, degrees in enumerate(DEGREES)
        }
    test_sets = [[name] for name in sections]
    if held_out == "pairs":
        test_sets += [list(pair) for pair in itertools.combinations(sections, 2)]

    steps = 5001 if paper else 700
    decay = dict(name="cosine_decay_schedule", init_value=0.05, decay_steps=steps)
    sgd = [
        dict(name="add_decayed_weights", weight_decay=5e-4),
        dict(name="sgd", learning_rate=decay, momentum=0.9, nesterov=True),
    ]
    stages = ConfigDict(sort_keys=False)
    for test_domains in test_sets:
        c = methods.leave_domains_out(
            sections, test_domains=test_domains, trial=trial, batch_size=64 if paper else 21
        )
        stages["_".join(test_domains)] = dict(data=c.data, evaluators=c.evaluators)
    del c.data, c.evaluators
    c.steps = steps
    c.log_every = c.eval_every = 100
    c.checkpoint_every = 500
    adam = dict(name="adam", learning_rate=1e-3)
    # The defaults of DomainBed's methods are for Adam; with this SGD IRM and V-REx diverge and MMD collapses.
    has_decaug_head = method.startswith("decaug") or method == "erm_on_decaug_head"
    c.optimizer = dict(name="chain", args=sgd) if has_decaug_head and not paper else adam
    c.update(
        methods.stage(
            method,
            network=dict(name="mnist_cnn") if paper else dict(name="mlp", hidden=[128, 128]),
            num_classes=10,
            num_contexts=len(sections) - 1,
            anneal_steps=500 if paper else 70,
            learning_rate=1e-3,
        )
    )
    c.stages = stages
    return c
