"""A small run of each method family on scikit-learn's digits, of some seconds, for `tests/stress.py`.

Arguments: the family, one of FAMILIES; where its batches are made, `device` or `host`.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.in_context import linear

FAMILIES = ("energy", "lff", "disentangled", "in_context", "domain_generalization", "lp_ft", "activations")
TRAIN, TEST = (dict(name="store.arrays", dataset="digits", split=split) for split in ("train", "test"))
# A step from the host takes longer.
STEPS = {"device": 2000, "host": 400}


def standardize(sign=1):
    """The transforms of digits, or of inverted ones."""
    return [dict(name="transforms.standardize", scale=16.0, mean=[0.305], std=[sign * 0.376])]


def get_config(family="energy", where="device"):
    check(family, FAMILIES, "family")
    steps = STEPS[check(where, ("device", "host"), "place")]
    if family == "in_context" and where == "host":
        raise ValueError("in_context: its prompts are generated on the device")

    def digits(split="train", sign=1):
        source = dict(dataset="digits", split=split)
        if where == "device":
            source = dict(dataset=dict(name="store.arrays", **source))
        return dict(name="streams.resident" if where == "device" else "streams.host", **source) | dict(
            transforms=standardize(sign)
        )

    def classifier(norm="batch_norm", **more):
        return dict(name="mlp", num_classes=10, hidden=[32, 32], norm=norm, **more)

    def stages(**sections):
        return ConfigDict(sections, sort_keys=False)

    sgd = dict(name="sgd", learning_rate=0.02, momentum=0.9)
    c = ConfigDict(sort_keys=False)
    c.seeds = 2
    c.steps = steps
    c.batch_size = 32
    c.log_every = steps // 40
    c.checkpoint_every = steps // 20
    c.eval_every = steps // 8
    c.data = digits()
    c.network = classifier()
    c.optimizer = sgd
    c.evaluators = dict(test=dict(name="classification", dataset=TEST, transforms=standardize()))
    pretrain = dict(method=dict(name="supervised.erm"))
    if family == "energy":
        detection = dict(
            name="ood_detection.detection",
            dataset=TEST,
            scores=["energy"],
            transforms=standardize(),
            ood=dict(inverted=dict(name="outliers.inverted", dataset=TEST, maximum=16)),
        )
        with_outliers = dict(
            name="streams.with_auxiliary", stream=digits(), auxiliary=digits("test", sign=-1)
        )
        c.stages = stages(
            pretrain=pretrain,
            energy=dict(
                method=dict(name="ood_detection.energy.fine_tune", auxiliary_loss="energy", margin_slack=2.0),
                data=with_outliers,
                evaluators=dict(**c.evaluators, detection=detection),
                init_from="pretrain",
            ),
        )
    elif family == "lff":
        c.method = dict(name="debiasing.lff", dataset=TRAIN)
        c.optimizer = dict(name="adam", learning_rate=1e-3)
    elif family == "disentangled":
        c.method = dict(name="debiasing.disentangled", dataset=TRAIN, num_classes=10, swap_start=steps // 2)
        c.method.update(lambda_dis_align=5.0, lambda_swap_align=5.0)
        c.network = dict(name="mlp", num_classes=None, hidden=[32, 16])
        c.optimizer = dict(name="adam", learning_rate=1e-3)
    elif family == "in_context":
        small = linear.get_config()
        c.method, c.data, c.network, c.optimizer = small.method, small.data, small.network, small.optimizer
        c.network.backbone.update(n_embd=16, n_layer=1)
        c.evaluators = {key: small.evaluators[key] for key in ("standard", "algorithms")}
    elif family == "domain_generalization":
        c.method = dict(name="domain_generalization.irm", weight=100.0, anneal_steps=steps // 2)
        parts = [digits("train[:400]"), digits("train[400:800]", sign=-1), digits("train[800:]")]
        c.data = dict(name="streams.environments", streams=parts)
        c.optimizer = dict(name="adam", learning_rate=1e-3)
    elif family == "lp_ft":
        phases = dict(probe_optimizer=sgd, probe_steps=steps // 2, pretrained_network=classifier())
        c.stages = stages(
            pretrain=pretrain,
            lp_ft=dict(
                method=dict(name="transfer.lp_ft", **phases),
                data=digits(sign=-1),
                init_from=dict(pretrained_network="pretrain"),
            ),
        )
    else:
        c.method = dict(name="supervised.erm")
        asymmetry = dict(
            name="activation_asymmetry.evaluation.asymmetry",
            dataset=TEST,
            bound=1.0,
            batch_size=199,
            transforms=standardize(),
        )
        c.evaluators.asymmetry = asymmetry
        c.stages = stages(
            **{
                order: dict(network=classifier(order=order, activation="tanh"))
                for order in ("convention", "swap")
            }
        )
    return c
