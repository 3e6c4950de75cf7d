"""Coloured digits (Nam et al., NeurIPS 2020), for every method of this folder.

  python -m launch.prepare_data mnist --source DIR
  python -m launch.train --config configs/debiasing/colored_mnist.py:cpu,lff --workdir runs/lff

Arguments, in this order: the size; the method, see configs/debiasing/methods.py; the share of
bias-conflicting training examples in percent (the papers' are 0.5, 1, 2, 5); mnist or fashion_mnist.

`cpu`: 8,000 digits to train and 2,000 to evaluate, averaged to 14×14; half a minute a method.
`paper`: all 60,000, 28×28, the schedules of the official codes: 100 epochs for LfF, and 50,000 steps at ten
times its learning rate for the disentangled method. It has not been run.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.debiasing import methods


def get_config(size="cpu", method="lff", conflicting="1", dataset="mnist"):
    check(size, ("cpu", "paper"), "size")
    check(dataset, ("mnist", "fashion_mnist"), "data set")
    paper = size == "paper"
    steps_per_epoch = 235 if paper else 32  # of batches of 256, the last of them full here
    std = 0.005  # severity 4, as in the official command; the paper's text has 0.01

    def images(split, **more):
        source = dict(name="store.arrays", dataset=dataset, split=split)
        pool = 1 if paper else 2
        return dict(name="coloring.colored_digits", dataset=source, std=std, pool=pool, **more)

    aligned_ratio = methods.aligned_ratio(conflicting)
    train = images(
        "train" if paper else "train[:8000]",
        aligned_ratio=aligned_ratio,
        keep_gray=method in methods.AMPLIFIED,
    )
    test = images("test" if paper else "test[:2000]", aligned_ratio=aligned_ratio, balanced=True, seed=1)
    # The official code divides by 255 twice. At the `cpu` size nothing is learnt in time from such inputs.
    transforms = [dict(name="transforms.standardize", scale=255.0**2 if paper else 255.0)]

    c = ConfigDict()
    c.seed = 0
    c.seeds = 3
    c.batch_size = 256
    c.data = dict(name="streams.resident", dataset=train, transforms=transforms)
    c.network = dict(name="mlp", num_classes=10, hidden=[100, 100, 100])
    c.stages = ConfigDict(sort_keys=False)
    stages = methods.stages(
        method,
        network=c.network.to_dict(),
        encoder=dict(name="mlp", num_classes=None, hidden=[100, 100, 16]),
        train=train,
        test=test,
        transforms=transforms,
        steps=(100 if paper else 40) * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        learning_rate=1e-3,
        definition=dict(name="recoloring", std=std, transforms=transforms),
        identification_epochs=4,  # ours: the first after which 98 % of the training set are right
        upweight=50.0,
        # BiasEnsemble's own: ten times LfF's learning rate, 50,000 steps.
        bias_ensemble=dict(ensemble_steps=500, steps=50_000, learning_rate=1e-2)
        if paper
        else dict(ensemble_steps=500, steps=40 * steps_per_epoch, learning_rate=1e-3),
        disentangled=dict(
            steps=50_000, learning_rate=1e-2, swap_start=10_000, decay_interval=10_000, weight=10.0
        )
        if paper
        else dict(steps=1860, learning_rate=1e-3, swap_start=600, decay_interval=600, weight=5.0),
    )
    c.log_every = steps_per_epoch
    c.eval_every = 5 * steps_per_epoch
    c.checkpoint_every = 10 * steps_per_epoch
    c.stages.update(stages)
    return c
