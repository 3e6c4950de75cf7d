import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.methods.domain_generalization.dann import dann, dann_losses, dann_schedule, is_discriminator_step
from jaxlab.nn.mlp import mlp
from tests.methods.domain_generalization import problem

E, WIDTH, LR_D, BETAS = problem.ENVIRONMENTS, problem.WIDTH, 2e-2, (0.5, 0.9)
RNG = np.random.default_rng(0)
Z, IDS = RNG.normal(size=(7, 4)), RNG.integers(0, E, 7, np.int32)
W1, W2 = RNG.normal(size=(4, 6)), RNG.normal(size=(6, E))
WEIGHTS = RNG.uniform(size=7)


def test_losses_and_gradients_are_those_of_torch_to_second_order():
    torch = pytest.importorskip("torch")

    def discriminate(params, z):
        return jnp.tanh(z @ params[0]) @ params[1]

    def ours(z, w1, w2):
        loss, parts = dann_losses(z, IDS, discriminate, (w1, w2), 0.3)
        weighted, _ = dann_losses(z, IDS, discriminate, (w1, w2), 0.3, WEIGHTS)
        parts.pop("accuracy")
        return {"loss": loss, "weighted": weighted, **parts}

    def expected(z, w1, w2):
        logits, ids = torch.tanh(z @ w1) @ w2, torch.tensor(IDS).long()
        losses = torch.nn.functional.cross_entropy(logits, ids, reduction="none")
        gradient = torch.autograd.grad(losses.sum(), z, create_graph=True)[0]
        penalty = sum(row.norm() ** 2 for row in gradient) / 7
        return {
            "loss": losses.mean() + 0.3 * penalty,
            "weighted": (torch.tensor(WEIGHTS) * losses).sum() + 0.3 * penalty,
            "cross_entropy": losses.mean(),
            "gradient_penalty": penalty,
        }

    problem.assert_gradients(ours, expected, Z, W1, W2)


@pytest.mark.parametrize(
    ("d_steps", "expected"),
    [(0, "gggggg"), (1, "gdgdgd"), (2, "dgddgddgd"), (3, "ddgdddgdddg")],
)
def test_the_counter_goes_up_before_it_is_asked(d_steps, expected):
    assert "".join(dann_schedule(step, d_steps)[0] for step in range(len(expected))) == expected
    assert "".join("gd"[bool(is_discriminator_step(s, d_steps))] for s in range(len(expected))) == expected


def _method(conditional, d_steps):
    return dann(
        problem.NETWORK,
        optax.adam(problem.LR, b1=BETAS[0], b2=BETAS[1]),
        discriminator_network=problem.fixed(mlp(E, hidden=(4,))),
        discriminator_optimizer=optax.adam(LR_D, b1=BETAS[0], b2=BETAS[1]),
        weight=0.8,
        d_steps=d_steps,
        grad_penalty=0.5,
        conditional=conditional,
    )


METHODS = {False: _method(False, 1), True: _method(True, 2)}


@pytest.mark.parametrize("conditional", [False, True])
def test_updates_of_both_kinds_are_those_of_torch(conditional):
    """Without contexts the environments are told apart, and contexts where a batch has them."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    method = METHODS[conditional]
    trajectory = problem.BATCHES
    if not conditional:
        trajectory = [{name: batch[name] for name in ("image", "label")} for batch in trajectory]
    state, update = method.init(problem.KEY, trajectory[0]), jax.jit(method.update)
    assert set(state.discriminator) == ({"network", "embedding"} if conditional else {"network"})
    network = problem.torch_layers(state.variables["params"])
    discriminator = problem.torch_layers(state.discriminator)
    network_adam, discriminator_adam = (
        torch.optim.Adam(jax.tree.leaves(part), lr=lr, betas=BETAS)
        for part, lr in ((network, problem.LR), (discriminator, LR_D))
    )
    kinds = "dgddgd" if conditional else "gdgdgd"
    for step, (kind, batch) in enumerate(zip(kinds, trajectory)):
        images, labels = problem.torch_batch(batch)
        y = torch.cat(labels)
        env = torch.cat([torch.full_like(l, e) for e, l in enumerate(labels)])
        if conditional:
            env = torch.tensor(batch["context"]).long().flatten()
        logits, z = problem.torch_mlp(network, torch.cat(images))
        seen = z + discriminator["embedding"][y] if conditional else z
        guess, _ = problem.torch_mlp(discriminator["network"], seen)
        each = functional.cross_entropy(guess, env, reduction="none")
        if conditional:
            count = functional.one_hot(y, problem.CLASSES).sum(0)
            cross_entropy = (each / (count[y] * problem.CLASSES)).sum()
        else:
            cross_entropy = each.mean()
        (gradient,) = torch.autograd.grad(each.sum(), seen, create_graph=True)
        disc_loss = cross_entropy + 0.5 * (gradient**2).sum(1).mean()
        risk = functional.cross_entropy(logits, y)
        network_adam.zero_grad()
        discriminator_adam.zero_grad()
        if kind == "d":
            disc_loss.backward()
            discriminator_adam.step()
        else:
            (risk - 0.8 * disc_loss).backward()
            network_adam.step()

        state, metrics = update(state, batch, jax.random.fold_in(problem.KEY, step))
        for name, value in {
            "loss": risk,
            "discriminator_loss": cross_entropy,
            "accuracy": (logits.argmax(1) == y).double().mean(),
            "discriminator_accuracy": (guess.argmax(1) == env).double().mean(),
        }.items():
            problem.assert_close(metrics[name], value.detach())
        problem.assert_params(state.variables["params"], network)
        problem.assert_params(state.discriminator, discriminator)
    assert state.step == problem.STEPS
    assert state.opt_state[0].count == kinds.count("g")
    assert state.discriminator_opt_state[0].count == kinds.count("d")
    assert update._cache_size() == 1


def test_prediction_is_that_of_the_network():
    method = METHODS[True]
    state = method.init(problem.KEY, problem.BATCHES[0])
    image = problem.BATCHES[0]["image"][0]
    expected = problem.NETWORK.apply(state.variables, image, train=False)[0]["logits"]
    np.testing.assert_array_equal(method.predict(state, {"image": image})["logits"], expected)
