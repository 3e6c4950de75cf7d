"""The protocol of the energy paper (Liu et al., NeurIPS 2020) for CIFAR-10 and CIFAR-100.

  python -m launch.prepare_data cifar10 --source cifar-10-batches-py
  python -m launch.prepare_data textures --source DIR --size 32      (likewise svhn_test, places365, ...)
  python -m launch.train --config configs/ood_detection/cifar.py:paper --workdir runs/cifar

Arguments, in this order: the size; cifar10 or cifar100.

`paper`: WRN-40-2, 100 epochs, then 10 of each fine-tuning with the published margins; six OOD sets, of which
2,000 images are drawn ten times. Auxiliary data are the 300,000 random images that the authors of Outlier
Exposure gave out after 80 Million Tiny Images was withdrawn: data set random_images. Each OOD set is a folder
of images, prepared at 32×32 (which squashes them, where the paper cuts out the centre), whichever its splits.
Not run.
`cpu`: 2,000 images to train and 1,000 to test, a small network, synthetic outliers only.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.ood_detection import stages

# Of the training images of CIFAR-10; the code has them for both.
NORMALIZATION = dict(mean=[125.3 / 255, 123.0 / 255, 113.9 / 255], std=[63.0 / 255, 62.1 / 255, 66.7 / 255])
OOD = ("textures", "svhn_test", "places365", "lsun_crop", "lsun_resize", "isun")
MARGINS = {"cifar10": (-23.0, -5.0), "cifar100": (-27.0, -5.0)}


def get_config(size="cpu", dataset="cifar10"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    margin_in, margin_out = MARGINS[check(dataset, MARGINS, "data set")]
    batch_size = 128
    steps_per_epoch = 391 if paper else 16

    def images(dataset, split):
        return dict(name="store.arrays", dataset=dataset, split=split)

    train = images(dataset, "train" if paper else "train[:2000]")
    test = images(dataset, "test" if paper else "test[:1000]")
    standardize = dict(name="transforms.standardize", **NORMALIZATION)
    augmentation = [dict(name="transforms.random_crop", padding=4), dict(name="transforms.random_flip")]
    stream = dict(name="streams.resident", dataset=train, transforms=[*augmentation, standardize])
    if paper:
        outliers = images("random_images", "all")
        ood = {name: images(name, "all") for name in OOD}
        draws = dict(n_ood=2000, draws=10)
    else:
        outliers = dict(name="outliers.pixel_permutation", dataset=train, count=4000)
        ood = dict(
            uniform=dict(name="outliers.uniform_noise", dataset=test, count=1000, maximum=255, seed=1),
            jigsaw=dict(name="outliers.quadrant_jigsaw", dataset=test),
            partly_inverted=dict(name="outliers.partly_inverted", dataset=test, maximum=255),
        )
        draws = dict(n_ood=200, draws=10)
    with_outliers = stages.with_outliers(
        stream, outliers, batch_size=batch_size, transforms=[*augmentation, standardize]
    )

    c = ConfigDict()
    c.seed = 0
    c.seeds = 1 if paper else 2
    c.batch_size = batch_size
    c.log_every = steps_per_epoch
    num_classes = 100 if dataset == "cifar100" else 10
    c.network = (
        dict(name="wide_resnet", num_classes=num_classes, depth=40, widen_factor=2, dropout_rate=0.3)
        if paper
        else dict(name="conv_net", num_classes=num_classes)
    )
    c.evaluators = dict(
        test=dict(name="classification", dataset=test, transforms=[standardize]),
        detection=dict(
            name="ood_detection.detection",
            dataset=test,
            train=train,
            scores=[
                "maximum_softmax_probability",
                "energy",
                dict(name="odin", input_std=NORMALIZATION["std"]),
                "mahalanobis",
            ],
            transforms=[standardize],
            ood=ConfigDict(ood, sort_keys=False),
            positive="id",
            rule="nearest",
            **draws,
        ),
    )

    def stage(method, data, epochs, learning_rate, **more):
        length = dict(steps=epochs * steps_per_epoch, checkpoint_every=steps_per_epoch)
        return stages.stage(method, data, learning_rate=learning_rate, **length, **more)

    fine_tuning = dict(epochs=10 if paper else 2, learning_rate=1e-3 if paper else 0.01, init_from="pretrain")
    margins = dict(margin_in=margin_in, margin_out=margin_out) if paper else {}
    c.stages = ConfigDict(sort_keys=False)
    erm = dict(name="supervised.erm")
    fine_tune = "ood_detection.energy.fine_tune"
    c.stages.pretrain = stage(erm, stream, epochs=100 if paper else 4, learning_rate=0.1)
    c.stages.outlier_exposure = stage(
        dict(name=fine_tune, auxiliary_loss="outlier_exposure"), with_outliers, **fine_tuning
    )
    c.stages.energy = stage(dict(name=fine_tune, **margins), with_outliers, **fine_tuning)
    return c
