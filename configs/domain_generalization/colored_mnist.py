"""Coloured MNIST (Arjovsky et al., 2019): the colour is the better guide in training, and wrong in the test.

  python -m launch.prepare_data mnist --source DIR
  python -m launch.train --config configs/domain_generalization/colored_mnist.py:cpu,irm --workdir runs/irm

Arguments, in this order: the size; the method, see METHODS here (irm build) or in methods.py (domainbed); the
build; of the domainbed build the trial, 0 to 19, the seed of its splits and draws.

`irm` build: full batches of two environments, 14×14, an MLP with one logit. `cpu`: 8,000 digits and 2,000
of the test; `paper`: 50,000 and 10,000, 10 restarts; oracle, ERM, IRM and V-REx with the hyper-parameters
of their official code, MM-REx with V-REx's, the others with ERM's. DecAug's orthogonality is a sum over the
batch, which is 125 or 780 times as large here as in its code, with the same weight. A restart has an order,
label noise and colours of its own; the test environment is the same for all. The official hyper-parameters
were chosen with sight of the test environment.
`domainbed` build: minibatches of 64 an environment; all digits are shared out to three environments, the last
of which is not trained on. `cpu`: 14×14 and an MLP; `paper`: 28×28 and DomainBed's network.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.domain_generalization import methods
from configs.domain_generalization.methods import prefix

# Of the irm build: hidden width, l2, learning rate, and the steps of official code at the `paper` size.
PAPER = {
    "erm": (256, 0.001, 0.001, 500),
    "irm": (390, 0.00110794568, 0.0004898536566546834, 500),
    "oracle": (83, 0.0008602868865288383, 0.0028171488133821726, 100),
    "vrex": (256, 0.001, 0.001, 500),
}
METHODS = (
    "oracle",
    "erm",
    "irm",
    "vrex",
    "mm_rex",
    "group_dro",
    "decaug",
    "decaug_paper",
    "decaug_environments",
)
FLIPS = {"environment_1": 0.1, "environment_2": 0.2, "environment_3": 0.9}  # of DomainBed


def get_config(size="cpu", method="irm", build="irm", trial="0"):
    check(size, ("cpu", "paper"), "size")
    check(build, ("irm", "domainbed"), "build")
    return irm_build(size == "paper", method) if build == "irm" else domainbed(size == "paper", method, trial)


def irm_build(paper, method):
    check(method, METHODS, "method of the irm build")
    hidden, l2, learning_rate, steps = PAPER.get(method, PAPER["erm"])
    if not paper:
        hidden, l2, steps = 64, 1.1e-3, 100 if method == "oracle" else 250
        learning_rate = learning_rate if method == "oracle" else 1e-3
    digits = dict(name="store.arrays", dataset="mnist")
    grey = [prefix("colored_mnist.without_color")] if method == "oracle" else []

    # Of IRM's code 190 and 91257; of V-REx's 100 and 10,000. The weight before is 1, not 0.
    weight, anneal_steps = (91257.18613115903, 190) if method == "irm" else (1e4, 100)
    annealed = dict(
        weight=weight if paper else 1e4,
        anneal_steps=anneal_steps if paper else 80,
        rescale=True,
        reset_optimizer=False,
    )
    one_logit = dict(l2=l2, loss="sigmoid")
    heads = dict(num_classes=2, num_contexts=2)
    sections = {
        "oracle": prefix("erm", **one_logit),
        "erm": prefix("erm", **one_logit),
        "irm": prefix("irm", estimator="square", **annealed, **one_logit),
        "vrex": prefix("vrex", kind="pair_square", reduction="sum", **annealed, **one_logit),
        "mm_rex": prefix("vrex", kind="pair_abs", reduction="sum", **annealed, **one_logit),
        "group_dro": prefix("group_dro", **one_logit),
        "decaug": prefix("decaug", **heads),
        "decaug_paper": prefix("decaug", form="paper", **heads),
        "decaug_environments": prefix("decaug", **heads),
    }
    context = {} if method == "decaug_environments" or "decaug" not in method else dict(context="color")

    c = ConfigDict()
    c.seed = 0
    c.seeds = 10 if paper else 3
    c.steps = steps
    c.batch_size = 50_000 if paper else 8000
    c.log_every = 10
    c.eval_every = 50 if paper else 25
    c.checkpoint_every = 100
    c.data = prefix(
        "colored_mnist.full_batch",
        dataset=digits | dict(split="train[:50000]" if paper else "train[:8000]"),
        transforms=grey,
        **context,
    )
    c.network = dict(
        name="mlp",
        num_classes=None if "decaug" in method else 1,
        hidden=[hidden, hidden],
        kernel_init=dict(name="jax.nn.initializers:xavier_uniform"),
        bias_init=dict(name="jax.nn.initializers:constant", value=0.0),
    )
    c.method = sections[method]
    c.optimizer = dict(name="adam", learning_rate=learning_rate)
    test = digits | dict(split="train[50000:60000]" if paper else "test[:2000]")
    c.evaluators = {
        environment: dict(
            name="classification",
            dataset=prefix("colored_mnist.colored_mnist", dataset=test, flip=flip, seed=1),
            transforms=grey,
        )
        for environment, flip in {"color_kept": 0.1, "color_reversed": 0.9}.items()
    }
    return c


def domainbed(paper, method, trial):
    check(method, methods.METHODS, "method")
    trial = int(check(trial, [str(i) for i in range(20)], "trial"))
    stride = 1 if paper else 2
    # DomainBed takes the digits of both files.
    digits = dict(name="store.arrays", dataset="mnist", split="train+test")

    def environment(index, flip):
        rows = prefix("colored_mnist.every_third", dataset=digits, start=index, seed=trial)
        return prefix(
            "colored_mnist.colored_mnist", dataset=rows, flip=flip, stride=stride, seed=3 * trial + index
        )

    whole = [environment(index, flip) for index, flip in enumerate(FLIPS.values())]
    network = dict(name="mnist_cnn") if paper else dict(name="mlp", hidden=[64, 64])
    c = methods.leave_domains_out(
        dict(zip(FLIPS, whole)),
        test_domains=[list(FLIPS)[-1]],
        trial=trial,
        batch_size=64,
    )
    c.steps = 5001 if paper else 600
    c.eval_every = c.log_every = 100
    c.checkpoint_every = 500
    c.optimizer = dict(name="adam", learning_rate=1e-3)
    c.update(
        methods.stage(
            method,
            network=network,
            num_classes=2,
            num_contexts=2,
            anneal_steps=500 if paper else 100,
            learning_rate=1e-3,
        )
    )
    return c
