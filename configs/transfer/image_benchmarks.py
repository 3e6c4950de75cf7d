"""LP, FT and LP-FT on image benchmarks of Kumar et al. (ICLR 2022), with the protocol of their code. Not run.

  python -m launch.prepare_data living17 --source DIR --size 256
  python -m launch.train --config configs/transfer/image_benchmarks.py:paper,living17 --workdir runs/living17
  python -m launch.select_stages runs/living17 --metric shift/validation_accuracy

Arguments: the size; the benchmark, a key of BENCHMARKS, which names the splits. DIR holds a folder of images
by class for each: of BREEDS's Living-17 and Entity-30 ("rand" split) source_train, source_val and target_val;
of DomainNet (the 40 classes of SENTRY) sketch_train, sketch_test, real_test, painting_test and clipart_test.
CIFAR-10 needs cifar10, stl10 and cifar10_1 (v6) as data sets.

Published, OOD accuracy of FT, LP and LP-FT: Living-17 77.8, 82.2, 82.6; Entity-30 60.7, 63.2, 62.3; DomainNet
55.5, 79.7, 80.7; STL 82.4, 85.1, 90.7; CIFAR-10.1 92.3, 82.7, 93.5. As there, validation is the test set in
distribution (its last half in `cpu`). The encoder starts from fresh weights; those of a file are read with
  --config.stages.lp.method.pretrained_network.name=third_party.torchvision_resnet:torchvision_resnet
  --config.stages.lp.method.pretrained_network.path=FILE
and likewise in each FT stage. The probe's features here are not augmented. FMoW and ImageNet are not here.

`cpu`: a small convolutional network on images prepared with --size 64, two epochs, two rates.
"""

from ml_collections import ConfigDict

from configs.arguments import check

# Number of classes, number of training images, test in distribution, tests out of it, and whether images are
# cropped at random; the training split is the first.
BENCHMARKS = {
    "living17": (17, 39_780, "source_train", "source_val", ("target_val",), True),
    "entity30": (30, 153_000, "source_train", "source_val", ("target_val",), True),
    "domainnet": (
        40,
        6_000,
        "sketch_train",
        "sketch_test",
        ("real_test", "painting_test", "clipart_test"),
        True,
    ),
    "cifar10": (10, 50_000, "train", "test", ("stl10", "cifar10_1"), False),
}
STL_AS_CIFAR = [0, 2, 1, 3, 4, 5, 7, -1, 8, 9]
RATES = ("3e-7", "1e-6", "3e-6", "1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2")
# The first deviation is as in the official code, where it is .228 and not .229.
IMAGENET = dict(name="transforms.standardize", mean=[0.485, 0.456, 0.406], std=[0.228, 0.224, 0.225])


def get_config(size="cpu", benchmark="living17"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    check(benchmark, BENCHMARKS, "benchmark")
    num_classes, num_images, train_split, test_split, ood_splits, crops = BENCHMARKS[benchmark]
    batch_size, epochs = (64, 20) if paper else (16, 2)
    if paper and benchmark == "domainnet":
        batch_size, epochs = 32, 50
    epoch_steps = -(-num_images // batch_size) if paper else 20
    side = 224 if paper else 64

    def images(split):
        if benchmark == "cifar10" and split not in ("train", "test"):
            source = dict(name="store.arrays", dataset=split, split="test")
            stl = dict(name="transfer.image_domains.relabelled", dataset=source, labels=STL_AS_CIFAR)
            return stl if split == "stl10" else source
        return dict(name="store.arrays", dataset=benchmark, split=split)

    train, test = images(train_split), images(test_split)
    ood = ConfigDict({split: images(split) for split in ood_splits}, sort_keys=False)
    transforms = [dict(name="transforms.resize", size=side), IMAGENET]
    augmentation = [
        dict(name="transforms.random_resized_crop", size=side, scale=[0.08, 1.0]),
        dict(name="transforms.random_flip"),
    ]
    encoder = (
        dict(name="imagenet_resnet", depth=50) if paper else dict(name="conv_net", channels=[16, 32, 64])
    )
    pretrained_network = dict(encoder, num_classes=None)
    shared = dict(dataset=test, ood=ood, transforms=transforms)
    validation = test if paper else images(f"{test_split}[50%:]")

    c = ConfigDict()
    c.seed = 0
    c.seeds = 3 if paper else 1
    c.batch_size = batch_size
    c.steps = epochs * epoch_steps
    c.log_every = epoch_steps
    c.checkpoint_every = epoch_steps
    c.network = dict(encoder, num_classes=num_classes)
    c.data = dict(
        name="streams.resident",
        dataset=train,
        transforms=[*augmentation, IMAGENET] if crops else transforms,
    )
    c.evaluators = dict(
        shift=dict(name="transfer.evaluation.shifted_accuracy", validation=validation, **shared),
        distortion=dict(name="transfer.evaluation.feature_distortion", **shared),
    )

    def stage(name, rate, init_from="", **keys):
        # Early stopping: result.json is of the last epoch; launch.evaluate --step best gives the best one's.
        schedule = dict(
            name="jaxlab.methods.transfer.lp_ft:epoch_cosine",
            init_value=float(rate),
            epoch_steps=epoch_steps,
            epochs=epochs,
        )
        return dict(
            method=dict(name=f"transfer.{name}", **keys),
            optimizer=dict(name="sgd", learning_rate=schedule, momentum=0.9),
            init_from=init_from,
            eval_every=epoch_steps,
            best_metric="shift/validation_accuracy",
        )

    c.stages = ConfigDict(sort_keys=False)
    c.stages.lp = dict(
        method=dict(
            name="transfer.linear_probe.exact",
            pretrained_network=pretrained_network,
            dataset=train,
            validation=validation,
            num_values=50 if paper else 5,
            transforms=transforms,
        ),
        steps=1,
    )
    for rate in RATES if paper else RATES[-2:]:
        c.stages[f"ft_lr_{rate}"] = stage("fine_tune", rate, pretrained_network=pretrained_network)
    for rate in RATES if paper else RATES[-2:]:
        c.stages[f"lp_ft_lr_{rate}"] = stage("fine_tune", rate, init_from="lp", batch_norm="eval")
    return c
