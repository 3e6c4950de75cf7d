import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.methods.domain_generalization.group_dro import group_dro, group_dro_update, group_risks
from tests.methods.domain_generalization import problem

UPDATE_WEIGHTS = jax.jit(group_dro_update)


def test_weights_are_those_of_the_official_recursion_over_many_steps():
    rng, eta = np.random.default_rng(0), 0.7
    log_q, q = jnp.full(4, -jnp.log(4)), np.full(4, 0.25)
    for _ in range(20):
        risks = rng.exponential(size=4) * [1, 1, 0, 2]  # the third group is in no batch
        q = q * np.exp(eta * risks)
        q = q / q.sum()
        log_q, weights = UPDATE_WEIGHTS(log_q, jnp.float32(risks), eta)
        problem.assert_close(weights, q)
        np.testing.assert_allclose(log_q, np.log(q), rtol=1e-4, atol=1e-4)


def test_weights_do_not_overflow_where_the_exponential_does():
    log_q, weights = UPDATE_WEIGHTS(jnp.full(2, -jnp.log(2)), jnp.array([1e6, 2e6]), 1.0)
    np.testing.assert_array_equal(weights, [0, 1])
    assert np.isfinite(log_q).all()
    _, back = UPDATE_WEIGHTS(log_q, jnp.array([3e6, 1e6]), 1.0)  # a group that had weight 0 can come back
    np.testing.assert_array_equal(back, [1, 0])


def test_no_gradient_flows_through_the_weights():
    log_q, risks = jnp.log(jnp.array([0.2, 0.3, 0.5])), jnp.array([1.0, 2.0, 0.5])

    def objective(risks):
        _, weights = group_dro_update(log_q, risks, 0.5)
        return jnp.sum(weights * risks), weights

    gradient, weights = jax.jit(jax.grad(objective, has_aux=True))(risks)
    np.testing.assert_array_equal(gradient, weights)


def test_group_risks_are_means_over_members_and_zero_without():
    losses, groups = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([2, 0, 2, 2])
    risks, gradient = jax.jit(lambda l: (group_risks(l, groups, 4), jax.jacrev(group_risks)(l, groups, 4)))(
        losses
    )
    np.testing.assert_allclose(risks, [2, 0, 13 / 3, 0], rtol=1e-6)
    expected = (groups == np.arange(4)[:, None]) / np.array([1, 1, 3, 1])[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def _robust(torch, q, risks, eta):
    """Updates the weights in place, then weighs the risks."""
    q *= torch.exp(eta * risks.detach())
    q /= q.sum()
    return (risks * q).sum()


def test_updates_are_those_of_torch_with_environments_as_groups():
    torch = pytest.importorskip("torch")
    q = torch.full((3,), 1 / 3, dtype=torch.float64)

    def loss(step, logits, features, labels, layers):
        risks = torch.stack([torch.nn.functional.cross_entropy(f, y) for f, y in zip(logits, labels)])
        value = _robust(torch, q, risks, 0.5)
        return value, {"risk": risks.mean(), "worst_risk": risks.max(), "largest_weight": q.max()}

    state = problem.assert_follows(group_dro(problem.NETWORK, problem.OPTIMIZER, step_size=0.5), loss)
    problem.assert_close(np.exp(state.log_q), q)
    assert q.max() - q.min() > 0.02


def test_updates_are_those_of_torch_with_groups_that_a_batch_names_and_may_lack():
    torch = pytest.importorskip("torch")
    groups, decay = 4, 0.01
    q = torch.full((groups,), 1 / groups, dtype=torch.float64)
    # Class crossed with attribute, as in the paper; the last group has members in even steps only.
    trajectory = [
        {**batch, "context": np.minimum(2 * batch["label"] + batch["context"], 3 if step % 2 == 0 else 2)}
        for step, batch in enumerate(problem.batches(environments=2, classes=2))
    ]

    def loss(step, logits, features, labels, layers):
        losses = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels), reduction="none")
        members = torch.tensor(trajectory[step]["context"].ravel()).long() == torch.arange(groups)[:, None]
        count = members.sum(1)
        risks = (members * losses).sum(1) / (count + (count == 0))
        value = _robust(torch, q, risks, 0.5)
        for tensor in jax.tree.leaves(layers):
            value = value + decay * (tensor**2).sum()
        return value, {"worst_risk": risks.max(), "largest_weight": q.max()}

    method = group_dro(problem.NETWORK, problem.OPTIMIZER, step_size=0.5, num_groups=groups, l2=decay)
    state = problem.assert_follows(method, loss, trajectory)
    problem.assert_close(np.exp(state.log_q), q)


def test_with_step_size_0_it_is_erm():
    state = problem.ERM.init(problem.KEY, problem.BATCHES[0])
    method = group_dro(problem.NETWORK, problem.OPTIMIZER, step_size=0.0)
    robust = method.init(problem.KEY, problem.BATCHES[0])
    update, update_erm = jax.jit(method.update), jax.jit(problem.ERM.update)
    for batch in problem.BATCHES[:3]:
        (robust, ours), (state, theirs) = (
            step(s, batch, problem.KEY) for step, s in ((update, robust), (update_erm, state))
        )
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-6)
    np.testing.assert_allclose(np.exp(robust.log_q), 1 / 3, rtol=1e-6)
    jax.tree.map(problem.assert_close, robust.variables, state.variables)
