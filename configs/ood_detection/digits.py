"""Energy-bounded fine-tuning on real digits (Liu et al., NeurIPS 2020), against Outlier Exposure.

  python -m launch.train --config configs/ood_detection/digits.py --workdir runs/digits

A classifier of scikit-learn's 8×8 digits is pre-trained, then fine-tuned from there in three ways: with the
energy-bounded loss, with Outlier Exposure, and with cross-entropy alone (the control). Auxiliary outliers
are training digits with shuffled pixels; the outliers of the test are of four other kinds.

FPR95 in %, mean over the four kinds and five seeds, that a PyTorch version of this experiment measured,
and ours:

                                            reference [range]   ours ± standard error
  pre-trained, maximum softmax probability  69   [65, 78]       60.5 ± 1.9
  pre-trained, energy                       68   [54, 74]       62.7 ± 2.0
  control, maximum softmax probability      none given          60.2 ± 1.8
  Outlier Exposure, max. softmax prob.      12.1 [7.6, 14.7]    14.5 ± 1.1
  energy-bounded, energy                     4.2 [2.7, 5.7]      5.2 ± 0.3
  accuracy: pre-trained, OE, energy         98.1, 97.3, 96.8    98.8, 98.4, 97.9

`paper` takes the network and the schedule of the paper (WRN-40-2, 100 and 10 epochs, its batch sizes and
learning rates) to the same digits. It has not been run.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.ood_detection import stages

TRAINING_EXAMPLES = 1200


def get_config(size="cpu"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    batch_size = 128 if paper else 64
    steps_per_epoch = -(-TRAINING_EXAMPLES // batch_size)

    train = dict(name="store.arrays", dataset="digits", split="train")
    test = dict(name="store.arrays", dataset="digits", split="test")
    # Pixels are 0 to 16; mean and deviation are those of the training digits.
    transforms = [dict(name="transforms.standardize", scale=16.0, mean=[0.305], std=[0.376])]
    digits = dict(name="streams.resident", dataset=train, transforms=transforms)
    shuffled_pixels = dict(name="outliers.pixel_permutation", dataset=train, count=2 * TRAINING_EXAMPLES)
    with_outliers = stages.with_outliers(
        digits, shuffled_pixels, batch_size=batch_size, transforms=transforms
    )

    c = ConfigDict()
    c.seed = 0
    c.seeds = 5
    c.batch_size = batch_size
    c.log_every = steps_per_epoch
    c.network = (
        dict(name="wide_resnet", num_classes=10, depth=40, widen_factor=2, dropout_rate=0.3)
        if paper
        else dict(name="mlp", num_classes=10, hidden=[128], norm="batch_norm")
    )
    c.evaluators = dict(
        test=dict(name="classification", dataset=test, transforms=transforms),
        detection=dict(
            name="ood_detection.detection",
            dataset=test,
            scores=["maximum_softmax_probability", "energy"],
            transforms=transforms,
            ood=dict(
                inverted=dict(name="outliers.inverted", dataset=test, maximum=16),
                jigsaw=dict(name="outliers.jigsaw", dataset=test, seed=1),
                transposed=dict(name="outliers.transposed_flipped", dataset=test),
                uniform=dict(name="outliers.uniform_noise", dataset=test, count=600, maximum=16, seed=2),
            ),
        ),
    )

    def stage(method, data, epochs, learning_rate, **more):
        length = dict(steps=epochs * steps_per_epoch, checkpoint_every=5 * steps_per_epoch)
        return stages.stage(method, data, learning_rate=learning_rate, **length, **more)

    fine_tuning = dict(epochs=10, learning_rate=1e-3 if paper else 0.01, init_from="pretrain")
    c.stages = ConfigDict(sort_keys=False)  # in this order in every table
    erm = dict(name="supervised.erm")
    c.stages.pretrain = stage(erm, digits, epochs=100 if paper else 30, learning_rate=0.1)
    c.stages.cross_entropy = stage(erm, digits, **fine_tuning)
    c.stages.outlier_exposure = stage(
        dict(name="ood_detection.energy.fine_tune", auxiliary_loss="outlier_exposure"),
        with_outliers,
        **fine_tuning,
    )
    c.stages.energy = stage(
        dict(name="ood_detection.energy.fine_tune", auxiliary_loss="energy", margin_slack=2.0),
        with_outliers,
        **fine_tuning,
    )
    return c
