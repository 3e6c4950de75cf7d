import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab.core import UserError
from jaxlab.core.updates import TrainState
from jaxlab.methods.domain_generalization.decaug import (
    OFFICIAL,
    PAPER,
    DecAugHead,
    combine_losses,
    decaug,
    decaug_loss,
    decaug_losses,
    decaug_predict,
    draw_ratio,
    feature_gradient,
    linear_head_feature_gradient,
    logits_as_features,
    mlp_branch,
    orthogonality_penalty,
    semantic_augmentation,
)
from jaxlab.metrics.classification import negative_log_likelihood
from jaxlab.nn.mlp import mlp
from tests.methods.domain_generalization import problem

B, D, K, C = 6, 4, 3, 2
LAYERS = {
    "category_branch": (D, D),
    "context_branch": (D, D),
    "category_classifier": (D, K),
    "context_classifier": (D, C),
    "classifier": (2 * D, K),
}
RNG = np.random.default_rng(0)
Z, Y, CONTEXT = RNG.normal(size=(B, D)), RNG.integers(0, K, B, np.int32), RNG.integers(0, C, B, np.int32)
RATIO = RNG.uniform(size=B)
HEAD = DecAugHead(K, C, D)
PARAMS = {name: {"kernel": RNG.normal(size=s), "bias": RNG.normal(size=s[1])} for name, s in LAYERS.items()}
LEAVES, STRUCTURE = jax.tree.flatten(PARAMS)
WEIGHTS = {"lambda_category": 0.5, "lambda_context": 0.3, "lambda_orth": 0.05, "radius": 1.5}
FORMS = {"official": OFFICIAL._replace(**WEIGHTS), "paper": PAPER._replace(**WEIGHTS)}


def _rows(array):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.asarray(array)).long()


def _torch_decaug(form, params, z, y, c, ratio):
    """The terms by example. Gradients are taken by autograd where the sheet has them as derivatives."""
    torch = pytest.importorskip("torch")
    y, c, ratio = _rows(y), _rows(c), torch.tensor(np.array(ratio), dtype=torch.float64)

    def linear(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    def cross_entropy(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def unit(x):
        return x / (x.norm(dim=1, keepdim=True) + 1e-8)

    z_cat, z_ctx = linear("category_branch", z), linear("context_branch", z)
    l_cat, l_ctx = linear("category_classifier", z_cat), linear("context_classifier", z_ctx)
    p, q = l_cat.softmax(1), l_ctx.softmax(1)
    one_hot = torch.nn.functional.one_hot
    if form == "official":
        M_y, M_c = (
            (params[f"{branch}_branch"]["kernel"] @ params[f"{branch}_classifier"]["kernel"]).T
            for branch in ("category", "context")
        )
        g = (p.detach() - one_hot(y, K)) @ M_y
        r = (q.detach() - one_hot(c, C)) @ M_c
        category, context = cross_entropy(p, y), cross_entropy(q, c)
    else:
        category, context = cross_entropy(l_cat, y), cross_entropy(l_ctx, c)
        (g,), (r,) = (torch.autograd.grad(loss.sum(), z, create_graph=True) for loss in (category, context))
    (a,) = torch.autograd.grad(cross_entropy(l_ctx, c).sum(), z_ctx, retain_graph=True)
    move = (ratio.reshape(-1, 1) * WEIGHTS["radius"] * unit(a)).detach()
    moved_loss = cross_entropy(linear("context_classifier", z_ctx + move), c).detach()
    return {
        "final": cross_entropy(linear("classifier", torch.cat([z_cat, z_ctx + move], 1)), y),
        "category": category,
        "context": context,
        "squared_cosine": (unit(g) * unit(r)).sum(1) ** 2,
        "shift_norm": move.norm(dim=1),
        "moved_context": moved_loss,
        "context_norm": z_ctx.detach().norm(dim=1),
        "accuracy": linear("classifier", torch.cat([z_cat, z_ctx], 1)).argmax(1) == y,
        "category_accuracy": l_cat.argmax(1) == y,
        "context_accuracy": l_ctx.argmax(1) == c,
    }


def _torch_total(form, terms):
    orth = terms["squared_cosine"]
    return (
        terms["final"].mean()
        + WEIGHTS["lambda_category"] * terms["category"].mean()
        + WEIGHTS["lambda_context"] * terms["context"].mean()
        + WEIGHTS["lambda_orth"] * (orth.sum() if form == "official" else orth.mean())
    )


def _ours(z, *leaves):
    scalars = {}
    for form, config in FORMS.items():
        ratio = jnp.asarray(RATIO) if form == "paper" else jnp.asarray(RATIO)[0]
        losses = decaug_losses(HEAD, jax.tree.unflatten(STRUCTURE, leaves), z, Y, CONTEXT, ratio, config)
        scalars[f"{form} total"] = combine_losses(losses, config)
        scalars[f"{form} cosines"] = losses["squared_cosine"].sum()
    return scalars


def _expected(z, *leaves):
    scalars, params = {}, jax.tree.unflatten(STRUCTURE, leaves)
    for form in FORMS:
        ratio = RATIO if form == "paper" else RATIO[0]
        terms = _torch_decaug(form, params, z, Y, CONTEXT, ratio)
        scalars[f"{form} total"] = _torch_total(form, terms)
        scalars[f"{form} cosines"] = terms["squared_cosine"].sum()
    return scalars


def test_both_forms_and_all_their_gradients_are_those_of_torch():
    _, gradients = problem.assert_gradients(_ours, _expected, Z, *LEAVES)
    seen = {}
    for form in FORMS:
        of_z, *of_leaves = gradients[f"{form} cosines"]
        tree = {"z": of_z, **jax.tree.unflatten(STRUCTURE, of_leaves)}
        names = {
            "/".join(key.key for key in path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if np.any(leaf != 0)
        }
        seen[form] = names
    weights = {f"{b}_{part}/kernel" for b in ("category", "context") for part in ("branch", "classifier")}
    assert seen["official"] == weights  # neither the backbone nor any bias
    assert seen["paper"] >= weights | {"z", "category_branch/bias", "context_classifier/bias"}
    assert not any(name == "classifier/kernel" for name in seen["paper"])


@pytest.mark.parametrize("certain", ["context", "both"])
def test_rows_that_a_branch_is_certain_of_give_no_nan(certain):
    params = jax.tree.map(np.copy, PARAMS)
    for branch, labels in (("category", Y), ("context", CONTEXT)):
        if certain in (branch, "both"):
            # Right in the rows of this label, where the gradient is zero, and wrong in all others.
            bias = params[f"{branch}_classifier"]["bias"]
            bias[labels[0]] += 1e4
    values, gradients = problem.assert_gradients(_ours, _expected, Z, *jax.tree.leaves(params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((values, gradients)))


def test_zero_rows_have_no_cosine_and_no_gradient_and_no_move():
    g = jnp.array([[0.0, 0], [0, 0], [3, 4], [1e-30, 0]])
    r = jnp.array([[0.0, 0], [1, 2], [0, 2], [1, 0]])

    @jax.jit
    def both(g, r):
        penalty, pull_back = jax.vjp(orthogonality_penalty, g, r)
        return penalty, pull_back(jnp.ones(4)), semantic_augmentation(r, g, jnp.float32(0.5), 2.0)

    penalty, gradients, moved = both(g, r)
    np.testing.assert_allclose(penalty, [0, 0, 0.64, 0], atol=1e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[:2], 0)
    np.testing.assert_allclose(moved, r + np.array([[0, 0], [0, 0], [0.6, 0.8], [0, 0]]), rtol=1e-6)


def test_the_move_raises_the_context_loss_of_every_example_whose_gradient_is_not_zero():
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(D, 5)), rng.normal(size=5)
    z, c = 2 * rng.normal(size=(500, D)), rng.integers(0, 5, 500)

    def loss(z, c):
        return negative_log_likelihood(z @ kernel + bias, c)

    @jax.jit
    def before_and_after(z, ratio):
        grad = linear_head_feature_gradient(jax.nn.softmax(z @ kernel + bias), c, kernel)
        after = loss(semantic_augmentation(z, grad, ratio, 1.0), c)
        return loss(z, c), after, jnp.linalg.norm(grad, axis=1), grad - feature_gradient(loss, z, c)

    with jax.enable_x64(True):
        for ratio in (np.float64(1e-3), rng.uniform(1e-3, 1, 500), np.float64(30.0)):
            before, after, norm, difference = jax.device_get(before_and_after(z, ratio))
            assert np.all(norm > 0)
            assert np.all(after > before)
            np.testing.assert_allclose(difference, 0, atol=1e-13)  # the closed form is the derivative


def test_a_shift_is_a_constant():
    z, grad = jnp.ones((2, D)), jnp.ones((2, D))
    gradients = jax.jit(jax.grad(lambda *x: semantic_augmentation(*x, 1.0).sum(), argnums=(0, 1, 2)))(
        z, grad, jnp.float32(0.5)
    )
    for gradient, expected in zip(gradients, (1, 0, 0)):
        np.testing.assert_array_equal(gradient, expected)


def _cosines(z, params, head, config):
    losses = decaug_losses(head, params, z, Y, CONTEXT, jnp.float32(1), config)
    return losses["squared_cosine"].sum(), losses["squared_cosine"]


def test_the_general_branch_is_the_closed_form_where_it_is_linear():
    head, params = DecAugHead(K, C, D, mlp_branch(hidden=())), jax.tree.map(np.float32, PARAMS)
    nested = params | {name: {"out": params[name]} for name in ("category_branch", "context_branch")}

    @jax.jit
    def compute(z):
        return [
            [
                jax.value_and_grad(_cosines, argnums=(0, 1), has_aux=True)(z, p, h, config)
                for config in (OFFICIAL, PAPER)
            ]
            for h, p in ((HEAD, params), (head, nested))
        ]

    closed, general = compute(Z.astype(np.float32))
    for _, (_, of_params) in general:
        for name in ("category_branch", "context_branch"):
            of_params[name] = of_params[name]["out"]
    jax.tree.map(problem.assert_close, general, closed)


def test_a_branch_of_an_mlp_ends_at_the_width_it_begins_with():
    head = DecAugHead(K, C, D, mlp_branch(hidden=(7, 5)))
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(head.init, problem.KEY, Z))["params"]
    for branch in ("category_branch", "context_branch"):
        kernels = {name: layer["kernel"] for name, layer in shapes[branch].items()}
        assert kernels == {"dense1": (D, 7), "dense2": (7, 5), "out": (5, D)}


def test_a_branch_with_hidden_layers_has_the_gradients_that_autodiff_gives():
    # Curved, so that the gradient at z has a slope in z.
    head = DecAugHead(K, C, D, nn.Sequential([nn.Dense(7), nn.tanh, nn.Dense(D)]))
    params = problem.fixed_variables(jax.eval_shape(head.init, problem.KEY, Z))["params"]

    def branch_loss(z, labels, branch):
        return negative_log_likelihood(getattr(head.apply({"params": params}, z), f"{branch}_logits"), labels)

    @jax.jit
    def compute(z):
        g, r = (
            feature_gradient(lambda z, l: branch_loss(z, l, branch), z, labels)  # noqa: B023
            for branch, labels in (("category", Y), ("context", CONTEXT))
        )
        cosine = jnp.sum(g * r, 1) / jnp.linalg.norm(g, axis=1) / jnp.linalg.norm(r, axis=1)
        gradients = [jax.grad(_cosines, has_aux=True)(z, params, head, c) for c in (OFFICIAL, PAPER)]
        return cosine**2, gradients

    expected, ((official_of_z, official), (paper_of_z, paper)) = compute(Z.astype(np.float32))
    problem.assert_close(official, expected)
    problem.assert_close(paper, expected)
    np.testing.assert_array_equal(official_of_z, 0)
    assert np.abs(paper_of_z).max() > 1e-3


BACKBONE = problem.fixed(logits_as_features(mlp(D, hidden=(problem.WIDTH,))))
OPTIMIZER = optax.chain(optax.add_decayed_weights(5e-3), optax.sgd(0.05, momentum=0.9, nesterov=True))


@pytest.mark.parametrize("form", ["official", "paper"])
def test_updates_are_those_of_torch(form):
    torch = pytest.importorskip("torch")
    method = decaug(BACKBONE, OPTIMIZER, num_classes=K, num_contexts=C, form=form, **WEIGHTS)
    # One form sees environments, the other one a flat batch.
    trajectory = problem.BATCHES
    if form == "paper":
        trajectory = [{name: np.concatenate(x) for name, x in batch.items()} for batch in trajectory]
    shapes = jax.eval_shape(method.init, problem.KEY, trajectory[0]).variables
    variables = problem.fixed_variables(shapes)
    state, update = TrainState(variables, OPTIMIZER.init(variables["params"])), jax.jit(method.update)
    layers = problem.torch_layers(state.variables["params"])
    sgd = torch.optim.SGD(jax.tree.leaves(layers), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)
    shape = () if form == "official" else (problem.ENVIRONMENTS * problem.SIZE,)
    draw = jax.jit(lambda key: jax.random.uniform(jax.random.split(key)[0], shape))
    for step, batch in enumerate(problem.BATCHES):
        key = jax.random.fold_in(problem.KEY, step)
        images, labels = problem.torch_batch(batch)
        z, _ = problem.torch_mlp(layers["backbone"], torch.cat(images))
        terms = _torch_decaug(form, layers["head"], z, torch.cat(labels), batch["context"].ravel(), draw(key))
        total = _torch_total(form, terms)
        sgd.zero_grad()
        total.backward()
        sgd.step()
        state, metrics = update(state, trajectory[step], key)
        assert set(metrics) == {"loss", *terms}
        problem.assert_close(metrics["loss"], total.detach())
        for name, values in terms.items():
            problem.assert_close(metrics[name], values.detach().double().mean())
        problem.assert_params(state.variables["params"], layers)
    assert update._cache_size() == 1

    # Prediction is from both embeddings as they are, without a context.
    image = problem.BATCHES[0]["image"][0]
    outputs = jax.jit(method.predict)(state, {"image": image})
    head = layers["head"]
    z, _ = problem.torch_mlp(layers["backbone"], torch.tensor(image, dtype=torch.float64))
    z_cat, z_ctx = (
        z @ head[f"{b}_branch"]["kernel"] + head[f"{b}_branch"]["bias"] for b in ("category", "context")
    )
    both = torch.cat([z_cat, z_ctx], 1)
    problem.assert_close(outputs["features"], both.detach())
    expected = (both @ head["classifier"]["kernel"] + head["classifier"]["bias"]).detach()
    problem.assert_close(outputs["logits"], expected)

    def apply(params, image):
        return BACKBONE.apply({"params": params}, image, train=False)[0]["features"]

    problem.assert_close(
        jax.jit(decaug_predict, static_argnums=0)(apply, state.variables["params"], image), expected
    )


def test_without_weights_and_radius_it_is_cross_entropy_on_the_head_of_both():
    config = OFFICIAL._replace(lambda_category=0, lambda_context=0, lambda_orth=0, radius=0)
    params = {"backbone": 2.0, "head": jax.tree.map(np.float32, PARAMS)}
    batch = {"image": Z.astype(np.float32), "label": Y, "context": CONTEXT}

    def apply(scale, image):
        return scale * image

    def plain(params):
        return negative_log_likelihood(decaug_predict(apply, params, batch["image"]), Y).mean()

    @jax.jit
    def both(params):
        ours = jax.value_and_grad(lambda p: decaug_loss(apply, p, batch, problem.KEY, config), has_aux=True)
        return ours(params), jax.value_and_grad(plain)(params)

    ((value, parts), gradient), (expected, expected_gradient) = both(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert parts["shift_norm"] == 0
    np.testing.assert_allclose(parts["final"], expected, rtol=1e-6)
    assert parts["moved_context"] > 0
    jax.tree.map(problem.assert_close, gradient, expected_gradient)


def test_the_ratio_is_uniform_one_for_the_batch_or_one_for_each():
    keys = jax.random.split(problem.KEY, 400)
    draw = jax.jit(jax.vmap(lambda key: [draw_ratio(key, 5, form) for form in (OFFICIAL, PAPER)]))
    one, each = jax.device_get(draw(keys))
    assert one.shape == (400,)
    assert each.shape == (400, 5)
    for ratio in (one, each):
        assert 0 <= ratio.min() < 0.02
        assert 0.98 < ratio.max() < 1
        np.testing.assert_allclose(ratio.mean(), 0.5, atol=0.06)
    assert len(np.unique(each[0])) == 5


def test_batches_without_context_are_refused():
    batch = {name: problem.BATCHES[0][name] for name in ("image", "label")}
    with pytest.raises(UserError, match="no 'context'"):
        decaug(BACKBONE, OPTIMIZER, num_classes=K, num_contexts=C).init(problem.KEY, batch)
