"""LP, FT, LP-FT and their peers under shift: Fashion-MNIST in four domains, of which one is fine-tuned on.

  python -m launch.prepare_data fashion_mnist --source DIR
  python -m launch.train --config configs/transfer/fashion_mnist.py --workdir runs/transfer
  python -m launch.select_stages runs/transfer --metric shift/validation_accuracy

An MLP is pretrained on images in all domains (as they are, inverted, transposed, both), then given a new head
and adapted on 500 other images as they are; the other three domains are out of distribution. Every method is
a stage for each learning rate; `select_stages` takes the rate with the best accuracy on 2,000 validation
images in distribution, and nothing else is tuned. WiSE-FT goes from LP half the way to the FT of one rate.

What must appear: LP-FT above FT by 3 points or more out of distribution and not more than 1 below it in;
features that FT moves twice as far in distribution as out of it, and five times as far as LP-FT; a rate of
LP-FT a tenth of FT's or less. Our figures: jaxlab/methods/transfer/README.md.

`paper` is the same with 40 times the images to fine-tune on and 28×28 pixels; not run.
"""

from ml_collections import ConfigDict

from configs.arguments import check

RATES = ("1e-4", "1e-3", "3e-3", "1e-2", "3e-2")
DOMAINS = ("inverted", "transposed", "inverted_transposed")


def prefix(name, **keys):
    return dict(name=f"transfer.{name}", **keys)


def sgd(rate, steps):
    schedule = dict(name="cosine_decay_schedule", init_value=float(rate), decay_steps=steps)
    return dict(name="sgd", learning_rate=schedule, momentum=0.9)


def get_config(size="cpu"):
    paper = check(size, ("cpu", "paper"), "size") == "paper"
    pretrain_images, train_images = (30_000, 20_000) if paper else (8000, 500)
    pretrain_steps, steps = (20_000, 6000) if paper else (1200, 400)
    batch_size = 64
    ends = pretrain_images, pretrain_images + train_images, pretrain_images + train_images + 2000

    def images(split):
        source = dict(name="store.arrays", dataset="fashion_mnist", split=split)
        return source if paper else dict(name="pooling.mean_pool", dataset=source, pool=2)

    pretrain = images(f"train[:{ends[0]}]")
    train = images(f"train[{ends[0]}:{ends[1]}]")
    validation = images(f"train[{ends[1]}:{ends[2]}]")
    test = images("test[:4000]")
    transforms = [dict(name="transforms.standardize", mean=[0.45], std=[0.36])]
    ood = {domain: prefix("image_domains.in_domain", dataset=test, domain=domain) for domain in DOMAINS}
    shared = dict(dataset=test, ood=ConfigDict(ood, sort_keys=False), transforms=transforms)
    accuracy = prefix("evaluation.shifted_accuracy", validation=validation, **shared)
    network = dict(name="mlp", num_classes=10, hidden=[256, 256, 256])

    c = ConfigDict()
    c.seed = 0
    c.seeds = 3
    c.steps = steps
    c.batch_size = batch_size
    c.log_every = steps // 4
    c.network = network
    c.data = dict(name="streams.resident", dataset=train, transforms=transforms)
    c.evaluators = dict(shift=accuracy, distortion=prefix("evaluation.feature_distortion", **shared))
    c.stages = ConfigDict(sort_keys=False)
    c.stages.pretrain = dict(
        method=dict(name="supervised.erm"),
        data=dict(
            name="streams.resident",
            dataset=prefix("image_domains.in_all_domains", dataset=pretrain),
            transforms=transforms,
        ),
        optimizer=sgd(0.05, pretrain_steps),
        steps=pretrain_steps,
        batch_size=128,
        evaluators=dict(shift=accuracy),
    )
    new_head = dict(init_from=dict(pretrained_network="pretrain"))

    def from_pretrained(name, **keys):
        return dict(method=prefix(name, pretrained_network=network, **keys), **new_head)

    def from_probe(name, **keys):
        return dict(method=prefix(name, **keys), init_from="lp")

    c.stages.lp = from_pretrained(
        "linear_probe.exact",
        dataset=train,
        validation=validation,
        num_values=50 if paper else 30,
        transforms=transforms,
    )
    c.stages.lp.steps = 1
    adaptations = {
        "lp_sgd": from_pretrained("linear_probe"),
        "ft": from_pretrained("fine_tune"),
        "lp_ft": from_probe("fine_tune", batch_norm="eval"),
        "lp_ft_in_phases": from_pretrained("lp_ft", probe_optimizer=sgd(0.03, steps), probe_steps=steps),
        "l2_sp": from_pretrained("l2_sp.fine_tune"),
        "side_tuning": from_pretrained("side_tuning"),
        "gradual_unfreezing": from_pretrained("unfreezing.gradual_unfreezing"),
        "auto_rgn": from_probe("unfreezing.auto_rgn", epoch_steps=steps // 8),
        **{f"surgical_{i}": from_probe("fine_tune", trainable=[f"dense{i}"]) for i in (1, 2, 3)},
    }
    for name, stage in adaptations.items():
        for rate in RATES:
            optimizer = sgd(rate, steps)
            if name == "auto_rgn":
                optimizer["name"] = "adam"
                del optimizer["momentum"]
            c.stages[f"{name}_lr_{rate}"] = dict(stage, optimizer=optimizer)
            if name == "lp_ft_in_phases":
                c.stages[f"{name}_lr_{rate}"].steps = 2 * steps
    for rate in RATES:
        between = dict(init_from=dict(network="lp", tuned_network=f"ft_lr_{rate}"), steps=1)
        fisher = dict(fisher_dataset=train, transforms=transforms)
        for name, keys in (("wise_ft", {}), ("wise_ft_fisher", fisher)):
            method = prefix("interpolation.wise_ft", tuned_network=network, **keys)
            c.stages[f"{name}_lr_{rate}"] = dict(method=method, **between)
    return c
