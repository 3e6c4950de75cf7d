"""Corrupted CIFAR-10 (Nam et al., NeurIPS 2020), for every method of this folder.

  python -m launch.prepare_data cifar10 --source DIR
  python -m launch.train --config configs/debiasing/corrupted_cifar10.py:paper,lff --workdir runs/cifar

Arguments, in this order: the size; the method, see configs/debiasing/methods.py; the share of
bias-conflicting training examples in percent (the papers' are 0.5, 1, 2, 5); the ten corruptions, `type0`,
`type1` (CIFAR-10¹ and ² of the paper) or `disentangled` (those of Lee et al., 2021); the folder of the
photographs of frost, without which frost is left out and its images stay as they are.

`paper`: ResNet-20 for 200 epochs; the disentangled method has ResNet-18 for small images, where the official
code keeps ImageNet's stem. `cpu`: 2,000 images, a network of three convolutions, 20 epochs. Neither has been
run: the images must be fetched first.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.debiasing import methods


def get_config(size="cpu", method="lff", conflicting="1", corruptions="type0", frost_dir=""):
    check(size, ("cpu", "paper"), "size")
    check(corruptions, ("type0", "type1", "disentangled"), "family of corruptions")
    paper = size == "paper"
    epochs, steps_per_epoch = (200, 196) if paper else (20, 8)

    def images(split, **more):
        return dict(
            name="corruptions.corrupted_images",
            dataset=dict(name="store.arrays", dataset="cifar10", split=split),
            corruptions=corruptions,
            frost_dir=frost_dir or None,
            **more,
        )

    aligned_ratio = methods.aligned_ratio(conflicting)
    train = images(
        "train" if paper else "train[:2000]",
        aligned_ratio=aligned_ratio,
        keep_variants=method in methods.AMPLIFIED,
    )
    test = images("test" if paper else "test[:1000]", aligned_ratio=aligned_ratio, balanced=True, seed=1)
    standardize = dict(
        name="transforms.standardize", mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010]
    )
    augment = [
        dict(name="transforms.random_crop", padding=4),
        dict(name="transforms.random_flip"),
        standardize,
    ]

    # As published for each share.
    disentangled_rate, disentangled_weight = {"0.5": (5e-4, 1.0), "5": (1e-3, 1.0)}.get(
        conflicting, (1e-3, 5.0)
    )

    c = ConfigDict()
    c.seed = 0
    c.seeds = 3
    c.batch_size = 256
    c.log_every = steps_per_epoch
    c.eval_every = 5 * steps_per_epoch
    c.checkpoint_every = 10 * steps_per_epoch
    c.data = dict(name="streams.resident", dataset=train, transforms=augment)
    c.network = (
        dict(name="resnet", num_classes=10, depth=20) if paper else dict(name="conv_net", num_classes=10)
    )
    c.stages = ConfigDict(sort_keys=False)
    c.stages.update(
        methods.stages(
            method,
            network=c.network.to_dict(),
            encoder=dict(name="resnet", num_classes=None, depth=18)
            if paper
            else dict(name="conv_net", num_classes=None),
            train=train,
            test=test,
            transforms=[standardize],
            steps=epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            learning_rate=1e-3,
            definition=dict(name="variant_lookup", transforms=augment),
            identification_epochs=4,
            upweight=50.0,
            bias_ensemble=dict(
                ensemble_steps=500 if paper else 80, steps=epochs * steps_per_epoch, learning_rate=1e-3
            ),
            disentangled=dict(
                steps=50_000 if paper else 160,
                learning_rate=disentangled_rate,
                swap_start=10_000 if paper else 50,
                decay_interval=10_000 if paper else 50,
                weight=disentangled_weight,
            ),
        )
    )
    return c
