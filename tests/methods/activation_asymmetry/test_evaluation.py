import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from jaxlab.core import Method, UserError
from jaxlab.methods.activation_asymmetry import metrics
from jaxlab.methods.activation_asymmetry.evaluation import asymmetry
from jaxlab.methods.supervised.erm import erm
from jaxlab.nn.conv_net import conv_net
from jaxlab.nn.mlp import mlp
from jaxlab.nn.normalization import batch_norm
from jaxlab.train import devices
from jaxlab.train.evaluation import make_evaluate

RNG = np.random.default_rng(0)
DATASET = {"image": RNG.normal(size=(48, 4, 4, 2)).astype(np.float32), "label": np.zeros(48, np.int32)}
NETWORK = conv_net(3, channels=(4, 6), strides=(1, 2), order="swap", activation="tanh")


def random_state(method: Method):
    """A state whose variables, running statistics too, are far from their start."""
    state = jax.eval_shape(method.init, jax.random.key(0), {"image": DATASET["image"][:1]})
    return jax.tree.map(lambda x: np.abs(RNG.normal(0.5, 1, x.shape)).astype(x.dtype), state)


def activations_by_hand(state, image):
    """What the two layers put out before and behind their normalisation, in float64 NumPy."""
    layers, x = [], np.asarray(image, np.float64)
    params, statistics = state.variables["params"], state.variables["batch_stats"]
    for i, stride in ((1, 1), (2, 2)):
        kernel, bias = (np.float64(params[f"conv{i}"][key]) for key in ("kernel", "bias"))
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
        act = np.tanh(np.einsum("nhwcij,ijcf->nhwf", patches, kernel) + bias)
        norm, running = params[f"norm{i}"], statistics[f"norm{i}"]
        x = (act - running["mean"]) / np.sqrt(running["var"] + 1e-5) * norm["scale"] + norm["bias"]
        layers.append((act.reshape(-1, act.shape[-1]), x.reshape(-1, x.shape[-1])))
    return layers


def test_every_layers_figures_are_those_computed_by_hand_however_batches_fall():
    method = erm(NETWORK, optax.sgd(0.1))
    state = random_state(method)
    evaluator = asymmetry(DATASET, batch_size=20)  # 20, 20 and 8 rows
    measured = evaluator.evaluate(jax.jit(method.predict), state)
    expected = {}
    for act, out in activations_by_hand(state, DATASET["image"]):
        valid = act.var(0) > 1e-12
        root, rms = np.sqrt(len(out)), np.sqrt((out**2).mean(0))
        hi, lo = (act >= 0.95).mean(0), (act <= -0.95).mean(0)
        middle = abs(act) < 1 / 11
        for name, value in {
            "skewness": abs(stats.skew(act[:, valid], axis=0)).mean(),
            "pooled_skewness": abs(stats.skew(act.ravel())),
            "constant_channels": (~valid).mean(),
            "saturation": abs(act).mean(),
            "histogram_saturation": (abs((act * middle).mean(0)) + (abs(act) * ~middle).mean(0)).mean(),
            "saturated_fraction": (hi + lo).mean(),
            "asymmetric_saturation": abs(hi - lo).mean(),
            "mean_asymmetry": abs(act.mean(0)).mean(),
            "hoyer_sparsity": ((root - abs(out).sum(0) / (root * rms)) / (root - 1)).mean(),
            "near_zero_fraction": (abs(out) < 0.25 * rms).mean(),
        }.items():
            expected.setdefault(f"layers/{name}", []).append(value)
    for name, values in expected.items():
        np.testing.assert_allclose(measured[name], values, rtol=2e-3, atol=1e-5, err_msg=name)
    for name in ("skewness", "saturation", "asymmetric_saturation", "hoyer_sparsity"):
        assert measured[name] == measured[f"layers/{name}"].mean()
    for i in (1, 2):
        np.testing.assert_allclose(measured[f"histogram/{i}/most/act"].sum(), 1)
        most, least = (abs(measured[f"histogram/{i}/{which}/skewness"][0]) for which in ("most", "least"))
        assert most > measured["layers/skewness"][i - 1] > least


def test_asking_for_activations_changes_no_output_and_costs_nothing_where_nobody_asks():
    method = erm(NETWORK, optax.sgd(0.1))
    state, image = random_state(method), DATASET["image"]
    asking = {**state.variables, "intermediates": {}}
    plain, variables = NETWORK.apply(state.variables, image, train=False)
    outputs, _ = NETWORK.apply(asking, image, train=False)
    assert variables is state.variables
    assert set(outputs) == {*plain, "activations"}
    np.testing.assert_array_equal(outputs["logits"], plain["logits"])
    _, updated = NETWORK.apply(asking, image, train=True)
    assert set(updated) == {"params", "batch_stats", "intermediates"}
    assert updated["intermediates"] == {}


def test_a_normalisation_in_front_of_the_activation_is_seen_from_both_sides():
    method = erm(mlp(3, hidden=(5,), norm="batch_norm", activation="tanh"), optax.sgd(0.1))
    state = random_state(method)
    asking = state._replace(variables={**state.variables, "intermediates": {}})
    (layer,) = method.predict(asking, DATASET)["activations"]
    hidden = DATASET["image"].reshape(48, -1) @ state.variables["params"]["dense1"]["kernel"]
    np.testing.assert_allclose(layer["norm_in"], hidden, rtol=1e-4, atol=1e-4)
    norm, running = state.variables["params"]["norm1"], state.variables["batch_stats"]["norm1"]
    normalized, _ = batch_norm(layer["norm_in"], norm, running, train=False)
    np.testing.assert_allclose(layer["norm_out"], normalized, rtol=1e-5)
    np.testing.assert_allclose(layer["act"], np.tanh(normalized), rtol=1e-5)

    evaluator = asymmetry(DATASET)
    measured = evaluator.evaluate(jax.jit(method.predict), state)
    most = {name.split("/")[-1] for name in measured if name.startswith("histogram/1/most")}
    assert most == {"norm_in", "norm_in_edges", "norm_out", "norm_out_edges", "act", "act_edges", "skewness"}
    results = {name: {"mean": v, "stderr": 0 * v, "values": [v]} for name, v in measured.items()}
    drawn = evaluator.plot(results)["channels"].axes
    assert [axes.get_title(loc="left").split(",")[0] for axes in drawn if axes.get_visible()] == 2 * [
        *("before batch norm", "behind batch norm", "activation")
    ]


def test_eight_devices_and_several_seeds_give_the_figures_of_one():
    method = erm(mlp(3, hidden=(5, 5), norm="batch_norm", order="swap", activation="tanh"), optax.sgd(0.1))
    states = jax.tree.map(lambda *x: np.stack(x), *(random_state(method) for _ in range(2)))
    evaluators = {"asymmetry": asymmetry(DATASET, batch_size=24)}

    def evaluate(count):
        mesh = devices.make_mesh(1, count, seeds=2, batch_size=8)
        return make_evaluate(method.predict, evaluators, mesh)(devices.put(states, devices.replicated(mesh)))

    one, eight = evaluate(1), evaluate(8)
    assert one.keys() == eight.keys()
    for name, summary in one.items():
        np.testing.assert_allclose(eight[name].values, summary.values, rtol=1e-4, atol=1e-5, err_msg=name)
    assert set(
        evaluators["asymmetry"].plot(
            {name.removeprefix("asymmetry/"): summary._asdict() for name, summary in one.items()}
        )
    ) == {"layers", "channels"}


def test_an_activation_without_bound_has_no_saturation_and_a_dead_network_no_nan():
    method = erm(mlp(3, hidden=(5,), activation="relu"), optax.sgd(0.1))
    dead = jax.tree.map(lambda x: -np.ones_like(x), random_state(method))
    dataset = {**DATASET, "image": np.abs(DATASET["image"])}
    evaluator = asymmetry(dataset, bound=None)
    measured = evaluator.evaluate(jax.jit(method.predict), dead)
    assert set(measured) == {
        *("skewness", "hoyer_sparsity"),
        *(f"layers/{name}" for name in ("skewness", "hoyer_sparsity", "near_zero_fraction")),
        *("layers/pooled_skewness", "layers/constant_channels"),
    }
    assert measured["layers/constant_channels"] == [1]
    assert measured["layers/near_zero_fraction"] == [1]
    assert all(np.isfinite(value).all() for value in measured.values())
    results = {name: {"mean": v, "stderr": np.nan * v, "values": [v]} for name, v in measured.items()}
    assert set(evaluator.plot(results)) == {"layers"}


def test_a_network_that_hands_out_nothing_is_the_users_error():
    def predict(state, batch):
        return {"logits": jnp.zeros((len(batch["image"]), 2))}

    method = erm(mlp(3, hidden=()), optax.sgd(0.1))
    for predicting in (predict, method.predict):
        with pytest.raises(UserError, match="hands out no activations"):
            asymmetry(DATASET).evaluate(predicting, random_state(method))


@pytest.mark.parametrize(
    ("keys", "message"),
    [(dict(bound=-1.0), "bound"), (dict(tau=2.0), "tau"), (dict(bins=0), "bins"), (dict(delta=0.0), "delta")],
)
def test_nonsense_is_refused_before_training(keys, message):
    with pytest.raises(UserError, match=f"{message}: expected"):
        asymmetry(DATASET, **keys)


def test_batch_norm_moves_a_one_sided_channel_to_small_and_large_values():
    """Relocation: at +1 with share p and at -1 otherwise, it comes out at √((1-p)/p) and -√(p/(1-p))."""
    share = np.array([0.95, 0.5, 0.2])
    a = np.where(np.arange(1000)[:, None] < 1000 * share, 1, -1).astype(np.float32)
    ones, zeros = jnp.ones(3), jnp.zeros(3)
    z, _ = batch_norm(a, {"scale": ones, "bias": zeros}, {"mean": zeros, "var": ones}, train=True, eps=0.0)
    np.testing.assert_allclose(z[0], np.sqrt((1 - share) / share), rtol=1e-5)
    np.testing.assert_allclose(z[-1], -np.sqrt(share / (1 - share)), rtol=1e-5)
    sparse = metrics.hoyer_sparsity(z)
    assert sparse[0] > sparse[2] > sparse[1]
    np.testing.assert_allclose(sparse[1], 0, atol=1e-6)
    np.testing.assert_allclose(metrics.near_zero_fraction(z, 0.25), [0.95, 0, 0])
