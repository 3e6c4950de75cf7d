"""Coloured digits as in `colored_mnist`, made of scikit-learn's 8×8 digits, which need no download.

  python -m launch.train --config configs/debiasing/colored_digits.py:cpu,lff --workdir runs/lff

Arguments, in this order: the size; the method, see configs/debiasing/methods.py; the share of
bias-conflicting training examples in percent.

`paper` is four times the steps of `cpu`; the digits are the same 1,200 to train and 597 to evaluate.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.debiasing import methods


def get_config(size="cpu", method="lff", conflicting="5"):
    check(size, ("cpu", "paper"), "size")
    batch_size, steps_per_epoch = 64, 19
    steps = (100 if size == "cpu" else 400) * steps_per_epoch
    std = 0.005

    def images(split, **more):
        source = dict(name="store.arrays", dataset="digits", split=split)
        return dict(name="coloring.colored_digits", dataset=source, std=std, maximum=16, **more)

    aligned_ratio = methods.aligned_ratio(conflicting)
    train = images("train", aligned_ratio=aligned_ratio, keep_gray=method in methods.AMPLIFIED)
    test = images("test", aligned_ratio=aligned_ratio, balanced=True, seed=1)
    transforms = [dict(name="transforms.standardize", scale=255.0)]

    c = ConfigDict()
    c.seed = 0
    c.seeds = 3
    c.batch_size = batch_size
    c.log_every = steps_per_epoch
    c.eval_every = 5 * steps_per_epoch
    c.checkpoint_every = 20 * steps_per_epoch
    c.data = dict(name="streams.resident", dataset=train, transforms=transforms)
    c.network = dict(name="mlp", num_classes=10, hidden=[100, 100, 100])
    c.stages = ConfigDict(sort_keys=False)
    c.stages.update(
        methods.stages(
            method,
            network=c.network.to_dict(),
            encoder=dict(name="mlp", num_classes=None, hidden=[100, 100, 16]),
            train=train,
            test=test,
            transforms=transforms,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            learning_rate=1e-3,
            definition=dict(name="recoloring", std=std, transforms=transforms),
            identification_epochs=10,
            upweight=20.0,
            bias_ensemble=dict(ensemble_steps=500, steps=steps, learning_rate=1e-3),
            disentangled=dict(
                steps=steps, learning_rate=1e-3, swap_start=steps // 3, decay_interval=steps // 3, weight=5.0
            ),
        )
    )
    return c
