"""Post-hoc scores and fine-tuning on Fashion-MNIST, against real digits and synthetic outliers.

  python -m launch.prepare_data fashion_mnist --source DIR
  python -m launch.prepare_data mnist --source DIR
  python -m launch.train --config configs/ood_detection/fashion_mnist.py --workdir runs/fashion

A classifier is pre-trained, then fine-tuned in three ways: with the energy-bounded loss, with Outlier
Exposure, and with cross-entropy alone (the control). Auxiliary outliers are blurred noise and strokes. Every
stage is measured with all scores; those with `search` choose their hyper-parameters on validation outliers.

`cpu`: 10,000 training images of 14×14, a small convolutional network. `paper`: all images, 28×28, but in the
test the 2,000 that the search validates on, WRN-40-2 and the schedule of the energy paper; not run.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.ood_detection import stages

STD = 0.353  # of the images, in 0..1
SCORES = {
    "maximum_softmax_probability": dict(name="maximum_softmax_probability"),
    "energy": dict(name="energy"),
    "max_logit": dict(name="max_logit"),
    "odin": dict(name="odin", temperature=1000.0, epsilon=0.0014, input_std=STD),
    "mahalanobis": dict(name="mahalanobis"),
    "knn": dict(name="knn", k=50),
    "vim": dict(name="vim"),
    "entropy": dict(name="entropy"),
    "temperature_scaled": dict(name="temperature_scaled"),
    "uniform_cross_entropy": dict(name="uniform_cross_entropy"),
    "gen": dict(name="gen"),
    "mahalanobis_noise": dict(name="mahalanobis", epsilon=0.002, input_std=STD),
    "relative_mahalanobis": dict(name="relative_mahalanobis"),
    "residual": dict(name="residual"),
    "react": dict(name="search", score="react", grid=dict(percentile=[80.0, 85.0, 90.0, 95.0, 99.0])),
    "react_max_logit": dict(name="react", percentile=90.0, then="max_logit"),
    "ash_p": dict(name="ash", variant="p"),
    "ash_s": dict(
        name="search", score="ash", grid=dict(percentile=[65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0])
    ),
    "ash_b": dict(name="ash", variant="b"),
    "scale": dict(name="search", score="scale", grid=dict(percentile=[65.0, 75.0, 85.0, 90.0, 95.0])),
    "dice": dict(name="search", score="dice", grid=dict(percentile=[10.0, 30.0, 50.0, 70.0, 90.0])),
    "grad_norm": dict(name="grad_norm"),
    "kl_matching": dict(name="kl_matching"),
    "she": dict(name="she"),
    "fdbd": dict(name="fdbd"),
    "nnguide": dict(name="nnguide"),
    "nci": dict(name="nci"),
    "vra": dict(name="vra"),
}


def get_config(size="cpu"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    examples = 60_000 if paper else 10_000
    batch_size = 128
    steps_per_epoch = -(-examples // batch_size)
    side = 28 if paper else 14

    def images(dataset, split):
        source = dict(name="store.arrays", dataset=dataset, split=split)
        return source if paper else dict(name="pooling.mean_pool", dataset=source, pool=2)

    train = images("fashion_mnist", f"train[:{examples}]")
    test = images("fashion_mnist", "test[:5000]+test[7000:]" if paper else "test[:5000]")
    one_in_five = images("fashion_mnist", "test[:1000]")
    validation = images("fashion_mnist", "test[5000:7000]")
    digits = images("mnist", "test[:1000]")
    transforms = [dict(name="transforms.standardize", mean=[0.286], std=[STD])]
    stream = dict(name="streams.resident", dataset=train, transforms=transforms)
    count = 12_000
    auxiliary = dict(
        name="outliers.concatenated",
        datasets=[
            dict(name="outliers.smooth_noise", count=3 * count // 4, size=side, maximum=255.0, seed=1),
            dict(name="outliers.soft_strokes", count=count // 4, size=side, maximum=255.0, seed=2),
        ],
    )
    with_outliers = stages.with_outliers(stream, auxiliary, batch_size=batch_size, transforms=transforms)

    c = ConfigDict()
    c.seed = 0
    c.seeds = 3
    c.batch_size = batch_size
    c.log_every = steps_per_epoch
    c.network = (
        dict(name="wide_resnet", num_classes=10, depth=40, widen_factor=2, dropout_rate=0.3)
        if paper
        else dict(name="conv_net", num_classes=10, channels=[16, 32, 64], strides=[1, 2, 2])
    )
    c.evaluators = dict(
        test=dict(name="classification", dataset=test, transforms=transforms),
        detection=dict(
            name="ood_detection.detection",
            dataset=test,
            train=train,
            scores=ConfigDict(SCORES, sort_keys=False),
            transforms=transforms,
            ood=ConfigDict(
                dict(
                    digits=digits,
                    mirrored_digits=dict(name="outliers.mirrored", dataset=digits),
                    uniform=dict(
                        name="outliers.uniform_noise", dataset=one_in_five, count=1000, maximum=255, seed=3
                    ),
                    gaussian=dict(
                        name="outliers.gaussian_noise", dataset=one_in_five, count=1000, maximum=255, seed=4
                    ),
                    jigsaw=dict(name="outliers.jigsaw", dataset=one_in_five, seed=5),
                    inverted=dict(name="outliers.inverted", dataset=one_in_five, maximum=255),
                ),
                sort_keys=False,
            ),
            # None of these is among the outliers of the test.
            validation=validation,
            validation_ood=dict(
                arithmetic_mean=dict(name="outliers.arithmetic_mean", dataset=validation, count=1000, seed=6),
                geometric_mean=dict(name="outliers.geometric_mean", dataset=validation, count=1000, seed=7),
                speckle=dict(name="outliers.speckle", dataset=validation, maximum=255, seed=8),
            ),
        ),
    )

    def stage(method, data, epochs, learning_rate, **more):
        length = dict(steps=epochs * steps_per_epoch, checkpoint_every=steps_per_epoch)
        return stages.stage(method, data, learning_rate=learning_rate, **length, **more)

    fine_tuning = dict(epochs=10 if paper else 3, learning_rate=1e-3 if paper else 0.01, init_from="pretrain")
    c.stages = ConfigDict(sort_keys=False)
    erm = dict(name="supervised.erm")
    fine_tune = "ood_detection.energy.fine_tune"
    c.stages.pretrain = stage(erm, stream, epochs=100 if paper else 6, learning_rate=0.1)
    c.stages.cross_entropy = stage(erm, stream, **fine_tuning)
    c.stages.outlier_exposure = stage(
        dict(name=fine_tune, auxiliary_loss="outlier_exposure"), with_outliers, **fine_tuning
    )
    c.stages.energy = stage(
        dict(name=fine_tune, auxiliary_loss="energy", margin_slack=3.0), with_outliers, **fine_tuning
    )
    return c
