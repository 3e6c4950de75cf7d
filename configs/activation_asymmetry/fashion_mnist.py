"""Where batch normalisation stands beside bounded activations, plain and shifted: one table, a stage each.

  python -m launch.prepare_data fashion_mnist --source DIR
  python -m launch.train --config configs/activation_asymmetry/fashion_mnist.py --workdir runs/asymmetry

A stage is an activation, an order and a shift; `test` has its accuracy, `asymmetry` what its channels are
like on 1,000 test images, the mean over layers. All stages share one optimizer, whose values a sweep varies:

  python -m launch.sweep --config configs/activation_asymmetry/fashion_mnist.py:paper --workdir runs/grid \\
      --grid config.optimizer.args.1.learning_rate.init_value=0.1,0.05,0.01 \\
      --grid config.optimizer.args.0.weight_decay=1e-4,5e-4,5e-3

Choose among those by `validation`, for each stage. Arguments, in this order: the size; `all` or one stage of
GRID; `all` or `norm_spared`, the parameters that decay.

`cpu`: the first 3,000 images of Fashion-MNIST at 14×14, three hidden layers of 256; the figures of its
reference and ours are in jaxlab/methods/activation_asymmetry/README.md. `paper`: VGG16 on CIFAR-10 with the
schedule and augmentation that the paper's first author uses elsewhere, for the paper's own could not be read;
not run.
"""

from ml_collections import ConfigDict

from configs.arguments import check

BOUNDS = {"tanh": 1.0, "lecun_tanh": 1.7159, "softsign": 1.0, "relu": None}
ORDERS = ("convention", "swap")
# Stage → activation, order, shift. A number in a stage's name is its shift.
GRID = {f"{activation}_{order}": (activation, order, 0.0) for activation in BOUNDS for order in ORDERS} | {
    f"tanh_{number}_{order}": ("tanh", order, shift)
    for number, shift in {"half": 0.5, "one": 1.0, "two": 2.0, "minus_one": -1.0}.items()
    for order in ORDERS
}


def get_config(size="cpu", stage="all", decayed="all"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    check(stage, ("all", *GRID), "stage")
    check(decayed, ("all", "norm_spared"), "set of decayed parameters")
    name, examples, batch_size, epochs = (
        ("cifar10", 45_000, 128, 200) if paper else ("fashion_mnist", 3000, 100, 30)
    )
    steps_per_epoch = -(-examples // batch_size)
    mean, std = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]) if paper else ([0.286], [0.353])
    transforms = [dict(name="transforms.standardize", mean=mean, std=std)]
    augmentation = [dict(name="transforms.random_crop", padding=4), dict(name="transforms.random_flip")]

    def images(split):
        source = dict(name="store.arrays", dataset=name, split=split)
        return source if paper else dict(name="pooling.mean_pool", dataset=source, pool=2)

    c = ConfigDict()
    c.seed = 0
    c.seeds = 3 if paper else 5
    c.batch_size = batch_size
    c.steps = epochs * steps_per_epoch
    c.log_every = steps_per_epoch
    c.checkpoint_every = 10 * steps_per_epoch
    if paper:
        c.eval_every = 5 * steps_per_epoch  # besides the last epoch's accuracy, the best
        c.best_metric = "validation/accuracy"
    c.method = dict(name="supervised.erm")
    c.data = dict(
        name="streams.resident",
        dataset=images(f"train[:{examples}]"),
        transforms=[*(augmentation if paper else []), *transforms],  # pads with black
    )
    decay = dict(name="add_decayed_weights", weight_decay=5e-4)
    if decayed == "norm_spared":
        decay["mask"] = dict(name="jaxlab.nn.weight_decay:spare", norm=True)
    schedule = (
        # ×0.1 after epochs 100 and 150.
        dict(
            name="exponential_decay",
            init_value=0.1,
            transition_begin=50 * steps_per_epoch,
            transition_steps=50 * steps_per_epoch,
            decay_rate=0.1,
            staircase=True,
        )
        if paper
        else dict(name="cosine_decay_schedule", init_value=0.1, decay_steps=c.steps)
    )
    c.optimizer = dict(name="chain", args=[decay, dict(name="sgd", learning_rate=schedule, momentum=0.9)])

    def part(activation, order, shift):
        sigma = dict(name="shifted", f=activation, shift=shift) if shift else activation
        shared = dict(num_classes=10, order=order, activation=sigma)
        gain = 2.0 if activation == "relu" else 25 / 9  # squared; Kaiming's, as PyTorch's table has it
        network = (
            # A fixed shift is studied without a bias, which could undo it.
            dict(name="vgg", cfg="vgg16", use_bias=False if shift else None, **shared)
            if paper
            else dict(
                name="mlp",
                hidden=[256, 256, 256],
                norm="batch_norm",
                use_bias=False,
                kernel_init=dict(
                    name="jax.nn.initializers:variance_scaling",
                    scale=gain,
                    mode="fan_in",
                    distribution="normal",
                ),
                **shared,
            )
        )
        evaluators = ConfigDict(sort_keys=False)
        if paper:
            evaluators.validation = dict(
                name="classification", dataset=images("train[45000:]"), transforms=transforms
            )
        evaluators.test = dict(name="classification", dataset=images("test"), transforms=transforms)
        evaluators.asymmetry = dict(
            name="activation_asymmetry.evaluation.asymmetry",
            dataset=images("test[:1000]"),
            bound=BOUNDS[activation],
            batch_size=250,
            transforms=transforms,
        )
        return dict(network=network, evaluators=evaluators)

    stages = {stage: GRID[stage]} if stage != "all" else GRID
    c.stages = ConfigDict({stage: part(*cell) for stage, cell in stages.items()}, sort_keys=False)
    return c
