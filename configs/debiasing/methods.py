"""The methods of this folder's configs, as stages of a run."""

from ml_collections import ConfigDict

from configs.arguments import check

METHODS = {
    "erm": "cross entropy",
    "upweighting": "cross entropy weighted by group, with the attribute labels of all training examples",
    "jtt": "Just Train Twice",
    "lff": "learning from failure",
    "lff_cross_entropy": "learning from failure, the biased network without its generalised cross entropy",
    "lff_batch": "learning from failure, relative difficulty of the batch's losses as they are",
    "disentangled": "disentangled feature augmentation",
    "disentangled_without_swap": "the same without the augmentation",
    "feature_recombine": "the same, its bias head learning from recombined features",
    "aligned_copy": "bias amplification: copies with the attribute of their class",
    "bias_only": "bias amplification: copies with any class's attribute as its label",
    "two_stage": "the same, the biased network trained first",
    "bias_ensemble": "BiasEnsemble: the biased network learns what an early-stopped ensemble is sure of",
    "disentangled_bias_ensemble": "BiasEnsemble for the disentangled method",
    "oracle_selection": "the biased network learns the aligned examples, with the attribute labels",
    "wrong_definition": "bias_only, with the attribute of the next class",
}

# Those whose training set keeps what the bias definition needs.
AMPLIFIED = ("aligned_copy", "bias_only", "two_stage", "oracle_selection", "wrong_definition")


def aligned_ratio(conflicting):
    """The share of aligned examples, from that of conflicting ones in percent, as text."""
    try:
        percent = float(conflicting)
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise ValueError(f"the share of conflicting examples is in percent, 0 to 100, not {conflicting!r}")
    return 1 - percent / 100


def stages(
    method,
    *,
    network,
    encoder,
    train,
    test,
    transforms,
    steps,
    steps_per_epoch,
    learning_rate,
    definition,
    identification_epochs,
    upweight,
    bias_ensemble,
    disentangled,
):
    """The stages of a method, the last one being the method itself.

    Args:
      method: a key of METHODS.
      network: section of the classifier.
      encoder: section of the encoder of the disentangled method.
      train, test: sections of the training set and of the balanced evaluation set.
      transforms: sections, those of evaluation.
      steps: of every stage that is not said to be shorter.
      steps_per_epoch: of the training set.
      learning_rate: Adam's.
      definition: section of the bias definition; `train` has what it needs.
      identification_epochs, upweight: of Just Train Twice.
      bias_ensemble: of BiasEnsemble: dict(ensemble_steps=..., steps=..., learning_rate=...).
      disentangled: its schedule and weights: dict(steps=..., learning_rate=..., swap_start=...,
        decay_interval=..., weight=...).
    """
    check(method, METHODS, "method")
    adam = dict(name="adam", learning_rate=learning_rate)
    batch = dict(dataset=train)
    frozen = dict(dataset=train, transforms=transforms)  # what a pass over the training set needs
    groups = dict(test=dict(name="groups", dataset=test, transforms=transforms))
    difficulty = dict(difficulty=dict(name="debiasing.difficulty", dataset=train))
    measured = {**groups["test"], "images": 0}
    biased = dict(biased=dict(name="debiasing.difficulty.biased_network", evaluator=measured))
    pair = {**groups, **biased, **difficulty}

    def stage(section, evaluators=pair, **more):
        evaluators = ConfigDict(evaluators, sort_keys=False)  # in this order in every table
        return dict(method=section, evaluators=evaluators, steps=steps, optimizer=adam, **more)

    def lff(**more):
        return stage(dict(name="debiasing.lff", **batch, **more))

    def amplified(synthesizer, definition=definition):
        name = "debiasing.bias_amplification.amplified_lff"
        return stage(dict(name=name, synthesizer=synthesizer, definition=definition, **batch))

    schedule = dict(
        name="jaxlab.methods.debiasing.disentangled:delayed_step_decay",
        base_lr=disentangled["learning_rate"],
        start=disentangled["swap_start"],
        interval=disentangled["decay_interval"],
        gamma=0.5,
    )

    def swapped(name="debiasing.disentangled", **more):
        section = dict(
            name=name,
            num_classes=10,
            swap_start=disentangled["swap_start"],
            lambda_dis_align=disentangled["weight"],
            lambda_swap_align=disentangled["weight"],
            **{**batch, **more},
        )
        return stage(section, {**groups, **difficulty}, network=encoder) | dict(
            steps=disentangled["steps"], optimizer=dict(name="adam", learning_rate=schedule)
        )

    if method == "erm":
        return dict(erm=stage(dict(name="supervised.erm"), groups))
    if method == "upweighting":
        return dict(upweighting=stage(dict(name="debiasing.reweighting.upweighting", **batch), groups))
    if method == "jtt":
        section = dict(name="debiasing.jtt", upweight=upweight, identification_network=network, **frozen)
        return dict(
            identification=stage(dict(name="supervised.erm"), groups)
            | dict(steps=identification_epochs * steps_per_epoch),
            jtt=stage(section, groups, init_from=dict(identification_network="identification")),
        )
    if method == "two_stage":
        amplified_erm = dict(name="debiasing.bias_amplification.amplified_erm", definition=definition)
        section = dict(name="debiasing.bias_amplification.two_stage_lff", biased_network=network, **frozen)
        return dict(
            biased=stage(amplified_erm, groups),
            two_stage=stage(section, init_from=dict(biased_network="biased")),
        )
    if method in ("bias_ensemble", "disentangled_bias_ensemble"):
        name = f"debiasing.bias_amplification.{method}"
        ensemble = dict(name="ensemble", size=5, network=network)
        trained = dict(ensemble_network=ensemble, **frozen)
        same = dict(optimizer=dict(name="adam", learning_rate=bias_ensemble["learning_rate"]))
        biased_ensemble = dict(name="debiasing.bias_amplification.biased_ensemble")
        if method == "bias_ensemble":
            last = stage(dict(name=name, **trained)) | same | dict(steps=bias_ensemble["steps"])
        else:
            last = swapped(name, **trained)
        return {
            "ensemble": stage(biased_ensemble, groups, network=ensemble)
            | same
            | dict(steps=bias_ensemble["ensemble_steps"]),
            method: last | dict(init_from=dict(ensemble_network="ensemble")),
        }
    wrong = {**definition, "aligned_attr": [(k + 1) % 10 for k in range(10)]}
    return {
        method: {
            "lff": lff,
            "lff_cross_entropy": lambda: lff(biased_loss="cross_entropy"),
            "lff_batch": lambda: lff(difficulty="batch"),
            "disentangled": swapped,
            "disentangled_without_swap": lambda: swapped(lambda_swap=0.0),
            "feature_recombine": lambda: swapped(recombine=True),
            "aligned_copy": lambda: amplified("aligned_copy"),
            "bias_only": lambda: amplified("bias_only"),
            "oracle_selection": lambda: amplified("select_aligned"),
            "wrong_definition": lambda: amplified("bias_only", wrong),
        }[method]()
    }
