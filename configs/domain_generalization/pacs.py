"""Folders of images by domain, each domain held out in turn: PACS and its like (DomainBed's protocol).

  python -m launch.prepare_data pacs --source DIR --size 256
  python -m launch.train --config configs/domain_generalization/pacs.py:paper,coral --workdir runs/coral
  python -m launch.model_selection runs/coral

A stage for each held-out domain. Arguments, in this order: the size; the method, see METHODS in methods.py;
the data set, a key of DOMAINS; the trial, 0 to 19, the seed of DomainBed's splits.

`paper`: 224×224, ResNet-50 with frozen batch normalisation, Adam 5e-5, batches of 32 a domain, DomainBed's
augmentation; DecAug has its own: ResNet-18 with a linear layer on top, SGD, batches of 63 (64 in the code),
no augmentation, and one learning rate for all domains (the code's differ by target); unlike its code it
trains for 5,001 steps, not 100 epochs, on 80 % of the sources, not 90 %. Both start from fresh weights;
ImageNet's are read from a file, for DecAug in config.network.network, with
  --config.network.name=third_party.torchvision_resnet:torchvision_resnet --config.network.path=resnet50.pth
`cpu`: images prepared with --size 64, a small convolutional network, 300 steps. Not run.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from configs.domain_generalization import methods
from configs.domain_generalization.methods import prefix

# Number of classes, and the folders in DomainBed's order.
DOMAINS = {
    "pacs": (7, ("art_painting", "cartoon", "photo", "sketch")),
    "vlcs": (5, ("Caltech101", "LabelMe", "SUN09", "VOC2007")),
    "office_home": (65, ("Art", "Clipart", "Product", "Real_World")),
    "terra_incognita": (10, ("location_100", "location_38", "location_43", "location_46")),
}
IMAGENET = dict(name="transforms.standardize", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def get_config(size="cpu", method="erm", dataset="pacs", trial="0"):
    check(size, ("cpu", "paper"), "size")
    check(dataset, DOMAINS, "data set")
    check(method, methods.METHODS, "method")
    trial = int(check(trial, [str(i) for i in range(20)], "trial"))
    paper = size == "paper"
    num_classes, names = DOMAINS[dataset]
    sections = {name: dict(name="store.arrays", dataset=dataset, split=name) for name in names}
    is_decaug = "decaug" in method
    side = 224 if paper else 64
    resize = dict(name="transforms.resize", size=side)
    augmentation = [
        dict(name="transforms.random_resized_crop", size=side, scale=[0.7, 1.0]),
        dict(name="transforms.random_flip"),
        dict(name="transforms.color_jitter", brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3),
        dict(name="transforms.random_grayscale", probability=0.1),
    ]

    if not paper:
        network = dict(name="conv_net", channels=[32, 64, 128])
    elif is_decaug:
        network = dict(name="imagenet_resnet", depth=18)
    else:
        network = dict(name="imagenet_resnet", depth=50, freeze_batch_norm=True)
    steps = 5001 if paper else 300
    stages = ConfigDict(sort_keys=False)
    for test_domain in names:
        c = methods.leave_domains_out(
            sections,
            test_domains=[test_domain],
            trial=trial,
            batch_size=(21 if is_decaug else 32) if paper else 16,
            transforms=[resize, IMAGENET],
            augmentation=[] if is_decaug else augmentation,
        )
        stages[test_domain] = dict(data=c.data, evaluators=c.evaluators)
    del c.data, c.evaluators
    c.update(
        methods.stage(
            method,
            network=network,
            num_classes=num_classes,
            num_contexts=len(names) - 1,
            anneal_steps=500 if paper else 100,
            learning_rate=5e-5 if paper else 1e-3,
        )
    )
    if is_decaug and paper:
        c.network = prefix("decaug.logits_as_features", network=network | dict(num_classes=512))
    c.steps = steps
    c.log_every = 100
    c.eval_every = c.checkpoint_every = 300
    decay = dict(name="cosine_decay_schedule", init_value=0.01, decay_steps=steps)
    sgd = [
        dict(name="add_decayed_weights", weight_decay=5e-4),
        dict(name="sgd", learning_rate=decay, momentum=0.9, nesterov=True),
    ]
    adam = dict(name="adam", learning_rate=5e-5 if paper else 1e-3)
    c.optimizer = dict(name="chain", args=sgd) if is_decaug and paper else adam
    c.stages = stages
    return c
