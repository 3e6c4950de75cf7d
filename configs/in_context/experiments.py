"""What the experiments of in-context learning have in common. Not a config itself.

Arguments of each config, in this order: the size, `cpu` or `paper`; the backbone, one of `BACKBONES`.
"""

from ml_collections import ConfigDict

from configs.arguments import check
from jaxlab.methods.in_context.backbones import SIZES

BACKBONES = ("gpt", "gpt_rotary", "linear_attention", "looped", "lstm", "gru", "state_space")
MODELS = {
    name: dict(n_embd=size.n_embd, n_layer=size.n_layer, n_head=size.n_head) for name, size in SIZES.items()
}
_PAPER_STEPS = 500_001  # the official loop's last step is number 500,000


def prompts(name, **keys):
    return dict(name=f"in_context.prompts.{name}", **keys)


def baseline(name, **keys):
    return dict(name=f"in_context.baselines.{name}", **keys)


def network(backbone, *, n_embd, n_layer, n_head, n_positions):
    """The network with a backbone of about the size of that GPT."""
    attention = dict(n_embd=n_embd, n_head=n_head, n_positions=n_positions)
    sections = {
        "gpt": dict(name="gpt", n_layer=n_layer, **attention),
        "gpt_rotary": dict(name="gpt", n_layer=n_layer, positions="rotary", **attention),
        "linear_attention": dict(name="linear_attention", n_layer=n_layer, **attention),
        "looped": dict(name="looped", block=dict(name="gpt", n_layer=1, **attention), loops=n_layer),
        "lstm": dict(name="lstm", n_embd=n_embd, n_layer=n_layer),
        "gru": dict(name="gru", n_embd=n_embd, n_layer=n_layer),
        "state_space": dict(name="state_space", n_embd=n_embd, n_layer=2 * n_layer),
    }
    section = sections[check(backbone, BACKBONES, "backbone")]
    return dict(name="in_context.model.in_context_model", backbone=section)


def errors(dimension, num_points, kinds, **keys):
    """An evaluator on several kinds of prompts: name → function, or keys of `prompt_kind`."""

    def kind(keys):
        keys = dict(function=keys) if "name" in keys else keys
        sizes = dict(dimension=dimension, num_points=num_points)
        return dict(name="in_context.evaluation.prompt_kind") | sizes | keys

    sections = {name: kind(keys) for name, keys in kinds.items()}
    return dict(name="in_context.evaluation.paired_errors", prompts=sections, **keys)


def stream(function, dimension, num_points, *, curriculum=None):
    """The prompts of training; `curriculum` is how many points more there are every 2,000 steps."""
    section = prompts("in_context_prompts", function=function, dimension=dimension, num_points=num_points)
    if curriculum:
        start = {2: 11, 5: 26}[curriculum]
        section |= dict(
            dims_curriculum=dict(start=5, end=dimension, inc=1, interval=2000),
            points_curriculum=dict(start=start, end=num_points, inc=curriculum, interval=2000),
        )
    return section


def settings(size, *, steps, learning_rate):
    """The flat keys; `paper` has its own steps and rate."""
    c = ConfigDict(sort_keys=False)
    c.seed = 0
    c.seeds = 1 if size == "paper" else 3
    c.batch_size = 64
    c.steps = _PAPER_STEPS if size == "paper" else steps
    c.log_every = 1000 if size == "paper" else 100
    c.eval_every = 50_000 if size == "paper" else 0
    c.checkpoint_every = 5000 if size == "paper" else 500
    c.optimizer = dict(name="adam", learning_rate=1e-4 if size == "paper" else learning_rate)
    c.method = dict(name="in_context.in_context_learning")
    return c


def config(size, backbone, function, dimension, num_points, *, curriculum, n_positions=None):
    """Training on one function class: in the paper by its standard network and curriculum."""
    paper = size == "paper"
    model = MODELS["standard"] if paper else dict(n_embd=64, n_layer=3, n_head=4)
    c = settings(size, steps=4000, learning_rate=2e-3)
    c.network = network(backbone, n_positions=101 if paper else n_positions or num_points, **model)
    c.data = stream(function, dimension, num_points, curriculum=curriculum if paper else None)
    return c
