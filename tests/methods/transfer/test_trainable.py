import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.methods.transfer.trainable import blocks, trainable_mask, unfreeze_factor, unfreeze_schedule

LAYER = {"kernel": np.ones((2, 2)), "bias": np.ones(2)}
RESNET = {
    "stem": LAYER,
    "stem_norm": LAYER,
    **{f"group{g}_block{b}": {"conv1": LAYER, "norm1": LAYER} for g in (1, 2) for b in (1, 2, 10)},
    "norm": LAYER,
    "head": LAYER,
}
NESTED = {"encoder": {"dense2": LAYER, "dense1": LAYER, "norm1": LAYER}, "head": LAYER}


def trained(params, spec, step=None):
    mask = trainable_mask(params, spec, step)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    found = set()
    for path, value in jax.tree_util.tree_leaves_with_path(mask):
        if value:
            found.add("/".join(entry.key for entry in path[:-1]))
    return found


def test_blocks_go_from_the_input_to_the_head():
    assert blocks(RESNET) == [
        ("stem", "stem_norm"),
        ("group1_block1",),
        ("group1_block2",),
        ("group1_block10",),
        ("group2_block1",),
        ("group2_block2",),
        ("group2_block10",),
        ("norm",),
    ]
    assert blocks(NESTED) == [("dense1", "norm1"), ("dense2",)]
    assert blocks({"encoder": np.ones(3), "head": LAYER}) == [("encoder",)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", {"encoder/dense1", "encoder/norm1", "encoder/dense2", "head"}),
        ("head", {"head"}),
        ("norm_only", {"encoder/norm1"}),
        (("top_k", 0), {"head"}),
        (("top_k", 1), {"head", "encoder/dense2"}),
        (("bottom_k", 1), {"encoder/dense1", "encoder/norm1"}),
        (("dense2",), {"encoder/dense2"}),
        (("norm_only", "head"), {"encoder/norm1", "head"}),
        (lambda step: step // 2, {"head", "encoder/dense2"}),
    ],
)
def test_a_spec_is_the_parameters_it_names(spec, expected):
    assert trained(NESTED, spec, step=3) == expected


def test_normalisations_are_found_within_blocks():
    found = trained(RESNET, "norm_only")
    assert {"stem_norm", "norm", "group2_block10/norm1"} <= found
    assert not any(name.endswith(("conv1", "stem", "head")) for name in found)


def test_a_schedule_may_be_traced():
    mask = jax.jit(lambda step: trainable_mask(NESTED, lambda s: s, step))(1)
    assert bool(mask["head"]["bias"])
    assert bool(mask["encoder"]["dense2"]["kernel"])
    assert not bool(mask["encoder"]["norm1"]["kernel"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("heads", "no 'heads'. Did you mean 'head'"),
        (("dense3",), "no 'dense3'"),
        (("top_k", 3), "top_k is 3; the encoder has 2 blocks"),
        (lambda step: step, "needs the step"),
    ],
)
def test_a_bad_spec_is_named(spec, message):
    with pytest.raises(UserError, match=message):
        trainable_mask(NESTED, spec)


@pytest.mark.parametrize(
    ("num_blocks", "num_steps", "warmup", "cooldown"), [(4, 20, 3, 5), (3, 7, 0, 0), (5, 6, 2, 3)]
)
def test_the_schedule_is_its_formula(num_blocks, num_steps, warmup, cooldown):
    schedule = jax.jit(unfreeze_schedule, static_argnums=(1, 2, 3, 4))
    factor = jax.jit(unfreeze_factor, static_argnums=(1, 2, 3, 4))
    for step in range(num_steps):
        active = max(1, num_steps - warmup - cooldown)
        cooling = step >= num_steps - cooldown
        if cooling or active == 1:
            tuned = num_blocks if cooling or step >= warmup else 0
            expected = 1.0
        else:
            tuned = max(0, step - warmup) * num_blocks // (active - 1)
            expected = np.exp(3.73 * (1 - max(0, step - warmup) / (active - 1)))
        assert schedule(step, num_blocks, num_steps, warmup, cooldown) == tuned
        np.testing.assert_allclose(factor(step, num_steps, warmup, cooldown), expected, rtol=1e-5)
    assert schedule(10 * num_steps, num_blocks, num_steps, warmup, cooldown) == num_blocks
    assert jnp.asarray(schedule(0, num_blocks, num_steps, warmup, cooldown)).dtype == jnp.int32
