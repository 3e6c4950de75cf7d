"""The methods of this folder's configs, with DomainBed's default hyper-parameters."""

from ml_collections import ConfigDict

from configs.arguments import check

METHODS = {
    "erm": "empirical risk minimisation",
    "irm": "invariant risk minimisation",
    "vrex": "risk extrapolation by the variance of risks",
    "mm_rex": "risk extrapolation by the absolute differences of risks",
    "group_dro": "group distributionally robust optimisation",
    "coral": "correlation alignment",
    "mmd": "maximum mean discrepancy",
    "mixup": "mixup between environments",
    "dann": "domain-adversarial network",
    "cdann": "the same, conditional on the class",
    "decaug": "DecAug, as released",
    "decaug_paper": "DecAug, as written in the paper",
    "erm_on_decaug_head": "DecAug without any of its losses or its augmentation",
}


def prefix(name, **keys):
    return dict(name=f"domain_generalization.{name}", **keys)


def stage(method, *, network, num_classes, num_contexts, anneal_steps, learning_rate, reset_optimizer=True):
    """The sections `method` and `network` of a method on minibatches.

    Args:
      method: a key of METHODS.
      network: section of a classifier without its number of classes.
      num_classes: of the classifier.
      num_contexts: that an example may be of; the environments, or a section that counts them.
      anneal_steps: of IRM and V-REx.
      learning_rate: of the adversary and its network's own Adam.
      reset_optimizer: of IRM and V-REx.
    """
    check(method, METHODS, "method")
    adversary = dict(
        discriminator_network=dict(name="mlp", num_classes=num_contexts, hidden=[256, 256]),
        discriminator_optimizer=dict(name="adam", learning_rate=learning_rate, b1=0.5, b2=0.9),
        optimizer=dict(name="adam", learning_rate=learning_rate, b1=0.5, b2=0.9),
    )
    heads = dict(num_classes=num_classes, num_contexts=num_contexts)
    annealed = dict(anneal_steps=anneal_steps, reset_optimizer=reset_optimizer)
    nothing = dict(lambda_category=0.0, lambda_context=0.0, lambda_orth=0.0, radius=0.0)
    section = {
        "erm": lambda: prefix("erm"),
        "irm": lambda: prefix("irm", weight=100.0, **annealed),
        "vrex": lambda: prefix("vrex", weight=10.0, **annealed),
        "mm_rex": lambda: prefix("vrex", kind="pair_abs", weight=10.0, **annealed),
        "group_dro": lambda: prefix("group_dro"),
        "coral": lambda: prefix("coral"),
        "mmd": lambda: prefix("mmd"),
        "mixup": lambda: prefix("mixup"),
        "dann": lambda: prefix("dann", **adversary),
        "cdann": lambda: prefix("dann", conditional=True, **adversary),
        "decaug": lambda: prefix("decaug", **heads),
        "decaug_paper": lambda: prefix("decaug", form="paper", **heads),
        "erm_on_decaug_head": lambda: prefix("decaug", **heads, **nothing),
    }[method]()
    is_encoder = section["name"].endswith(".decaug")
    return dict(method=section, network=network | dict(num_classes=None if is_encoder else num_classes))


def parts(domains, trial):
    """Sections of both parts of each domain, from sections of the domains in order."""
    return {
        name: {
            part: prefix("evaluation.holdout", dataset=domain, part=part, environment=index, trial_seed=trial)
            for part in ("in", "out")
        }
        for index, (name, domain) in enumerate(domains.items())
    }


def leave_domains_out(domains, *, test_domains, trial, batch_size, transforms=(), augmentation=()):
    """Data and evaluator of DomainBed's protocol: training on the in-splits of all domains but some.

    Args:
      domains: name → section of a data set, in DomainBed's order.
      test_domains: names.
      trial: seed of the splits.
      batch_size: of each environment; with replacement.
      transforms: sections, those of evaluation.
      augmentation: sections, of training, before them.
    """
    split = parts(domains, trial)
    streams = [
        dict(
            name="streams.sampled",
            dataset=split[name]["in"],
            transforms=[*augmentation, *transforms],
        )
        for name in domains
        if name not in test_domains
    ]
    c = ConfigDict(sort_keys=False)
    c.seed = 0
    c.seeds = 3
    c.batch_size = batch_size
    c.data = dict(name="streams.environments", streams=streams)
    c.evaluators = ConfigDict(sort_keys=False)
    c.evaluators.domains = dict(
        name="domain_generalization.evaluation.domain_accuracy",
        domains=ConfigDict(split, sort_keys=False),
        test_domains=list(test_domains),
        transforms=list(transforms),
    )
    return c
