import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.container import BarContainer

from jaxlab.core import UserError
from jaxlab.methods.domain_generalization.evaluation import domain_accuracy, holdout
from jaxlab.methods.domain_generalization.model_selection import holdout_split

RNG = np.random.default_rng(0)


def _part(size, channels=1):
    return {
        "image": RNG.uniform(size=(size, 3, 3, channels)).astype(np.float32),
        "label": RNG.integers(0, 3, size, np.int32),
    }


DOMAINS = {
    "photo": {"in": _part(11), "out": _part(4)},
    "sketch": {"in": _part(5), "out": _part(1)},
}


@jax.jit
def _predict(weight, batch):
    return {"logits": batch["image"].reshape(len(batch["image"]), -1) @ weight}


def test_accuracy_is_that_of_each_part_of_each_domain_whatever_the_batches():
    weight = RNG.normal(size=(9, 3)).astype(np.float32)
    double = (lambda batch, key: {**batch, "image": 2 * batch["image"] - 1},)
    evaluator = domain_accuracy(DOMAINS, test_domains=("sketch",), batch_size=4, transforms=double)
    results = evaluator.evaluate(_predict, jnp.asarray(weight))
    expected = {
        f"{domain}/{part}_accuracy": np.mean(
            ((2 * data["image"] - 1).reshape(-1, 9) @ weight).argmax(1) == data["label"]
        )
        for domain, parts in DOMAINS.items()
        for part, data in parts.items()
    }
    assert results == pytest.approx(expected)
    assert len(set(results.values())) > 2


def test_a_holdout_is_the_split_of_domainbed_row_for_row():
    data = {"image": np.arange(26).reshape(13, 2), "label": np.arange(13)}
    inner, outer = (holdout(data, part=part, environment=2, trial_seed=5) for part in ("in", "out"))
    for part, rows in zip((inner, outer), holdout_split(13, 5, 2)):
        np.testing.assert_array_equal(part["label"], rows)
        np.testing.assert_array_equal(part["image"], data["image"][rows])
    assert len(outer["label"]) == 2  # a fifth, rounded down
    assert sorted([*inner["label"], *outer["label"]]) == list(range(13))
    larger = holdout(data, part="out", environment=2, trial_seed=5, holdout_fraction=0.5)
    assert len(larger["label"]) == 6


def test_plots_show_every_domain_and_mark_the_held_out_ones():
    domains = DOMAINS | {"colored": {"in": _part(9, channels=2), "out": _part(2, channels=2)}}
    evaluator = domain_accuracy(domains, test_domains=("sketch",))
    heights = RNG.uniform(size=6)
    names = [f"{domain}/{part}_accuracy" for domain in domains for part in ("in", "out")]
    # A single seed has no standard error.
    results = {name: {"mean": height, "stderr": np.nan} for name, height in zip(names, heights)}
    figures = evaluator.plot(results)
    assert set(figures) == {"domains", "examples"}
    axes = figures["domains"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["photo", "sketch\n(test)", "colored"]
    bars = [bars for bars in axes.containers if isinstance(bars, BarContainer)]
    drawn = [[bar.get_height() for bar in container] for container in bars]
    np.testing.assert_allclose(drawn, heights.reshape(3, 2).T)
    panels = figures["examples"].axes
    assert len(panels) == 3 * 8
    assert [len(panel.images) for panel in panels] == [1] * 8 + [1] * 5 + [0] * 3 + [1] * 8
    for figure in figures.values():
        figure.canvas.draw()


def test_what_is_none_of_the_domains_or_parts_is_refused():
    with pytest.raises(UserError, match="no domain 'sketsh'.*sketch"):
        domain_accuracy(DOMAINS, test_domains=("sketsh",))
    with pytest.raises(UserError, match="domains.photo: expected the parts 'in' and 'out', got in"):
        domain_accuracy({"photo": {"in": _part(2)}}, test_domains=())
