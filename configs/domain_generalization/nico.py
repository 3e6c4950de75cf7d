"""NICO: animals or vehicles in contexts; for each class one context is for validation and one for the test.

  python -m launch.prepare_data nico_animal --source DIR/Animal --size 225
  python -m launch.train --config configs/domain_generalization/nico.py:paper,decaug --workdir runs/nico

Arguments, in this order: the size; the method, see METHODS in methods.py; animal or vehicle.

A batch holds examples of several contexts, drawn at random like the groups of WILDS; they are the
environments. `paper`: 225×225, ResNet-18 (for DecAug with a linear layer on top), SGD at the learning rate of
DecAug's code, 80,000 batches of 64, about its 500 epochs; the code crops 225×225 from images of 233×233.
`cpu`: images prepared with --size 64, a small convolutional network, 300 steps. Not run.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.domain_generalization import methods
from configs.domain_generalization.methods import prefix

# Of DecAug's code: the number of classes, the learning rate, and mean and deviation of the channels.
SUPERCLASSES = {
    "animal": (10, 0.05, [104.079, 107.423, 104.984], [47.554, 48.668, 53.170]),
    "vehicle": (9, 0.03, [159.063, 155.365, 154.892], [56.217, 55.824, 53.863]),
}
CONTEXTS_PER_BATCH = 8


def get_config(size="cpu", method="decaug", superclass="animal"):
    check(size, ("cpu", "paper"), "size")
    check(superclass, SUPERCLASSES, "superclass")
    paper = size == "paper"
    num_classes, learning_rate, mean, std = SUPERCLASSES[superclass]
    dataset = f"nico_{superclass}"
    transforms = [
        dict(
            name="transforms.standardize",
            mean=[m / 255 for m in mean],
            std=[deviation / 255 for deviation in std],
        )
    ]

    contexts = dict(name="store.num_classes", dataset=dataset, feature="context")

    def images(split):
        return dict(name="store.arrays", dataset=dataset, split=split)

    c = ConfigDict()
    c.seed = 0
    c.seeds = 3
    c.steps = 80_000 if paper else 300
    c.batch_size = 8
    c.log_every = 100
    c.eval_every = c.checkpoint_every = 1600 if paper else 100
    c.best_metric = "val/accuracy"
    c.data = dict(
        name="streams.grouped",
        dataset=images("train"),
        group="context",
        groups_per_batch=CONTEXTS_PER_BATCH,
        transforms=transforms,
    )
    c.update(
        methods.stage(
            method,
            network=dict(name="imagenet_resnet", depth=18)
            if paper
            else dict(name="conv_net", channels=[32, 64, 128]),
            num_classes=num_classes,
            num_contexts=contexts,
            anneal_steps=500 if paper else 100,
            learning_rate=1e-3,
            reset_optimizer=False,  # the schedule of the learning rate would begin again
        )
    )
    if paper and c.network.num_classes is None:
        backbone = c.network.to_dict() | dict(num_classes=512)
        c.network = prefix("decaug.logits_as_features", network=backbone)
    if method == "group_dro":
        c.method.num_groups = contexts
    decay = dict(name="cosine_decay_schedule", init_value=learning_rate, decay_steps=c.steps)
    sgd = [
        dict(name="add_decayed_weights", weight_decay=5e-4),
        dict(name="sgd", learning_rate=decay, momentum=0.9, nesterov=True),
    ]
    c.optimizer = dict(name="chain", args=sgd)
    c.evaluators = {
        split: dict(name="classification", dataset=images(split), transforms=transforms)
        for split in ("val", "test")
    } | {
        "contexts": prefix(
            "wilds.wilds_evaluation", dataset=images("test"), group_by=["context"], transforms=transforms
        )
    }
    return c
