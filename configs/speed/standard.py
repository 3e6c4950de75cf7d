"""What `make bench` measures: steps on data of no meaning, of the sizes that the papers train on.

  python -m launch.benchmark configs/speed/standard.py:resnet_18 --against both

Arguments: a key of PROGRAMS; the number of seeds. These are no experiments; figures stand in
launch/README.md.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.in_context import experiments

STANDARDIZE = dict(name="transforms.standardize", mean=[0.5], std=[0.25])


def noise(size, channels=3, count=10_000):
    return dict(name="noise.images", count=count, size=size, channels=channels)


def classification(network, batch_size, **sgd):
    """Images as CIFAR's, augmented as is usual, with the optimizer of the network's paper."""
    augmentation = [dict(name="transforms.random_crop", padding=4), dict(name="transforms.random_flip")]
    return dict(
        batch_size=batch_size,
        data=dict(name="streams.resident", dataset=noise(size=32), transforms=[*augmentation, STANDARDIZE]),
        network=dict(num_classes=10, **network),
        method=dict(name="supervised.erm"),
        optimizer=dict(name="sgd", learning_rate=0.1, momentum=0.9, **sgd),
    )


def lff(size, batch_size):
    """Learning from failure on coloured digits."""
    gray = noise(size=size, channels=1)
    colored = dict(name="coloring.colored_digits", dataset=gray, aligned_ratio=0.99, std=0.005)
    return dict(
        batch_size=batch_size,
        data=dict(name="streams.resident", dataset=colored, transforms=[STANDARDIZE]),
        network=dict(name="mlp", num_classes=10, hidden=[100, 100, 100]),
        method=dict(name="debiasing.lff", dataset=colored),
        optimizer=dict(name="adam", learning_rate=1e-3),
    )


def in_context(model):
    """Linear functions in 20 dimensions, 41 points, as the paper trains on after its curriculum."""
    dimension, num_points = 20, 41
    return dict(
        batch_size=64,
        data=experiments.stream(dict(name="linear"), dimension, num_points),
        network=experiments.network("gpt", n_positions=101, **experiments.MODELS[model]),
        method=dict(name="in_context.in_context_learning"),
        optimizer=dict(name="adam", learning_rate=1e-4),
        steps_per_call=5,  # of up to half a second each
    )


def irm():
    """Invariant risk minimisation on coloured MNIST, full batch, 8,000 digits."""
    method = dict(name="domain_generalization.irm", estimator="square", weight=1e4, anneal_steps=80)
    return dict(
        batch_size=8000,
        data=dict(
            name="domain_generalization.colored_mnist.full_batch",
            dataset=noise(size=28, channels=1, count=8000),
        ),
        network=dict(name="mlp", num_classes=1, hidden=[64, 64]),
        method=method | dict(rescale=True, reset_optimizer=False, l2=1.1e-3, loss="sigmoid"),
        optimizer=dict(name="adam", learning_rate=1e-3),
    )


def scores():
    """A network for 14×14 images, and what the post-hoc scores are fitted on and score: for `--scores`."""
    images = noise(size=14, channels=1)
    detection = dict(dataset=images, train=images, ood=dict(others=images | dict(seed=1)))
    return dict(
        batch_size=128,
        data=dict(name="streams.resident", dataset=images, transforms=[STANDARDIZE]),
        network=dict(name="conv_net", num_classes=10, channels=[16, 32, 64], strides=[1, 2, 2]),
        method=dict(name="supervised.erm"),
        optimizer=dict(name="sgd", learning_rate=0.1),
        evaluators=dict(
            detection=dict(name="ood_detection.detection", transforms=[STANDARDIZE], **detection)
        ),
    )


PROGRAMS = {
    "lff": lambda: lff(size=28, batch_size=256),
    "lff_digits": lambda: lff(size=8, batch_size=64),
    "resnet_18": lambda: classification(dict(name="resnet", depth=18), 32),
    "resnet_20": lambda: classification(dict(name="resnet", depth=20), 128),
    "wide_resnet": lambda: classification(dict(name="wide_resnet", dropout_rate=0.3), 32, nesterov=True),
    "in_context_tiny": lambda: in_context("tiny"),
    "in_context_small": lambda: in_context("small"),
    "irm": irm,
    "scores": scores,
}


def get_config(program="lff", seeds="1"):
    c = ConfigDict(PROGRAMS[check(program, PROGRAMS, "program")](), sort_keys=False)
    c.seeds = int(seeds)
    c.steps = 1000
    c.log_every = 100
    return c
