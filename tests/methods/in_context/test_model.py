import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.core.resolve import build
from jaxlab.methods.in_context.backbones import SIZES, gpt
from jaxlab.methods.in_context.model import in_context_model, load_gpt2_params

D, K = 3, 4
SMALL = dict(n_embd=8, n_layer=2, n_head=2, n_positions=5)


def prompts(seed=0, points=K):
    rng = np.random.default_rng(seed)
    return {
        "xs": rng.normal(size=(2, points, D)).astype(np.float32),
        "ys": rng.normal(size=(2, points)).astype(np.float32),
    }


def random_variables(network, inputs):
    """Variables far from where they start, for which nothing is compiled."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype), shapes)


def torch_gpt2(*, dims, n_positions, n_embd, n_layer, n_head):
    """The model of Garg et al. on transformers' GPT-2, with its names; weights far from their initial size."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(inputs, outputs))
            self.bias = nn.Parameter(torch.empty(outputs))

        def forward(self, x):
            return x @ self.weight + self.bias

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            length = 2 * n_positions
            self.register_buffer("bias", torch.ones(length, length, dtype=torch.uint8).tril()[None, None])
            self.register_buffer("masked_bias", torch.tensor(-1e4))
            self.c_attn, self.c_proj = Conv1D(3 * n_embd, n_embd), Conv1D(n_embd, n_embd)

        def forward(self, x):
            heads = []
            query, key, value = self.c_attn(x).split(n_embd, dim=2)
            size = n_embd // n_head
            for i in range(n_head):
                q, k, v = (part[:, :, i * size : (i + 1) * size] for part in (query, key, value))
                scores = q @ k.transpose(1, 2) / size**0.5
                visible = self.bias[0, 0, : x.shape[1], : x.shape[1]].bool()
                heads.append(torch.where(visible, scores, self.masked_bias).softmax(-1) @ v)
            return self.c_proj(torch.cat(heads, 2))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = Conv1D(4 * n_embd, n_embd), Conv1D(n_embd, 4 * n_embd)

        def forward(self, x):
            h = self.c_fc(x)
            gelu = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
            return self.c_proj(gelu)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(n_embd, eps=1e-5), nn.LayerNorm(n_embd, eps=1e-5)
            self.attn, self.mlp = Attention(), MLP()

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            return x + self.mlp(self.ln_2(x))

    class GPT2Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(11, n_embd), nn.Embedding(2 * n_positions, n_embd)
            self.h = nn.ModuleList(Block() for _ in range(n_layer))
            self.ln_f = nn.LayerNorm(n_embd, eps=1e-5)

        def forward(self, x):
            x = x + self.wpe(torch.arange(x.shape[1]))
            for block in self.h:
                x = block(x)
            return self.ln_f(x)

    class TransformerModel(nn.Module):
        def __init__(self):
            super().__init__()
            self._read_in, self._backbone = nn.Linear(dims, n_embd), GPT2Model()
            self._read_out = nn.Linear(n_embd, 1)

        def forward(self, xs, ys):
            zs = torch.zeros(xs.shape[0], 2 * xs.shape[1], xs.shape[2])
            zs[:, ::2], zs[:, 1::2, 0] = xs, ys
            return self._read_out(self._backbone(self._read_in(zs)))[:, ::2, 0]

    module = TransformerModel()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return module


def arrays(state_dict):
    return {name: value.detach().numpy() for name, value in state_dict.items()}


@pytest.fixture
def state_dict():
    return arrays(torch_gpt2(dims=D, **SMALL).state_dict())


def test_official_weights_give_the_predictions_and_gradients_of_the_official_model():
    torch = pytest.importorskip("torch")
    module, network, inputs = torch_gpt2(dims=D, **SMALL), in_context_model(gpt(**SMALL)), prompts()
    params = load_gpt2_params(arrays(module.state_dict()))

    @jax.jit
    def run(params):
        def loss(params):
            predictions = network.apply({"params": params}, inputs, train=True)[0]["predictions"]
            return jnp.mean((predictions - inputs["ys"]) ** 2), predictions

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, predictions), gradient = run(params)
    expected = module(*(torch.from_numpy(inputs[name]) for name in ("xs", "ys")))
    expected_loss = ((expected - torch.from_numpy(inputs["ys"])) ** 2).mean()
    expected_loss.backward()
    assert np.std(predictions) > 0.1
    np.testing.assert_allclose(predictions, expected.detach(), atol=1e-5)
    np.testing.assert_allclose(loss, expected_loss.detach(), rtol=1e-5)
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    assert "_backbone.wte.weight" not in gradients
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        gradient,
        load_gpt2_params(gradients),
    )


def test_official_weights_have_the_shapes_that_the_network_starts_with(state_dict):
    network = in_context_model(gpt(**SMALL))
    variables = jax.eval_shape(network.init, jax.random.key(0), prompts())
    params = load_gpt2_params(state_dict)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("_backbone.h.1.mlp.c_fc.weight", None, r"_backbone\.h\.1\.mlp\.c_fc\.weight: missing"),
        ("_read_in.weight", None, r"_read_in\.weight: missing"),
        (
            "_backbone.h.0.attn.c_attn.weight",
            np.transpose,
            r"c_attn\.weight: shape \(24, 8\), expected \(8, 24\)",
        ),
        ("_backbone.wpe.weight", np.ravel, r"wpe\.weight: shape \(80,\), expected \(any, 8\)"),
        ("_backbone.h.0.attn.rotary", np.ravel, r"_backbone\.h\.0\.attn\.rotary: no part of this model"),
    ],
)
def test_a_wrong_tensor_is_named(state_dict, name, change, message):
    value = state_dict.pop(name, np.zeros(3))
    if change:
        state_dict[name] = change(value)
    with pytest.raises(UserError, match=message):
        load_gpt2_params(state_dict)


@pytest.mark.parametrize(
    ("size", "parameters"), [("tiny", 164_417), ("small", 1_218_561), ("standard", 9_534_977)]
)
def test_each_size_has_its_known_number_of_parameters(size, parameters):
    network = in_context_model(gpt(**SIZES[size]._asdict()))
    inputs = {"xs": jnp.zeros((1, 2, 20)), "ys": jnp.zeros((1, 2))}
    variables = jax.eval_shape(network.init, jax.random.key(0), inputs)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def test_read_in_and_read_out_start_as_in_torch():
    network = in_context_model(gpt(n_embd=256, n_layer=1, n_head=2))
    inputs = {"xs": jnp.zeros((1, 2, 25)), "ys": jnp.zeros((1, 2))}

    @jax.jit  # only the layers that are returned are compiled
    def init(key):
        params = network.init(key, inputs)["params"]
        return {name: params[name] for name in ("read_in", "read_out")}

    params = init(jax.random.key(0))
    for layer, fan_in in (("read_in", 25), ("read_out", 256)):
        bound = fan_in**-0.5
        kernel = np.asarray(params[layer]["kernel"])
        assert 0.9 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / np.sqrt(3), rtol=0.1)
        assert 0 < np.abs(params[layer]["bias"]).max() <= bound


@pytest.mark.parametrize(("layout", "width"), [("shared", D), ("own", D + 1)])
def test_a_prediction_sees_the_examples_before_it_and_its_own_input(layout, width):
    network, inputs = in_context_model(gpt(**{**SMALL, "n_layer": 1}), layout=layout), prompts()
    variables = random_variables(network, inputs)
    assert variables["params"]["read_in"]["kernel"].shape == (width, 8)

    @jax.jit
    def influence(inputs):
        """[K, K] for each of xs and ys: how much prediction i moves with point j."""
        jacobian = jax.jacrev(lambda inputs: network.apply(variables, inputs, train=False)[0]["predictions"])(
            inputs
        )
        return jnp.abs(jacobian["xs"]).sum((0, 2, 4)), jnp.abs(jacobian["ys"]).sum((0, 2))

    xs, ys = map(np.asarray, influence(inputs))
    np.testing.assert_array_equal(xs > 0, np.tri(K, K, dtype=bool))
    np.testing.assert_array_equal(ys > 0, np.tri(K, K, -1, dtype=bool))


def test_predictions_are_the_read_out_of_the_features_and_do_not_change_with_the_prompts_length():
    network, inputs = in_context_model(gpt(**{**SMALL, "n_layer": 1})), prompts()
    variables = random_variables(network, inputs)
    apply = jax.jit(lambda inputs: network.apply(variables, inputs, train=False)[0])
    outputs = apply(inputs)
    assert outputs["features"].shape == (2, K, 8)
    read_out = variables["params"]["read_out"]
    expected = outputs["features"] @ read_out["kernel"][:, 0] + read_out["bias"]
    np.testing.assert_allclose(outputs["predictions"], expected, atol=1e-5)
    shorter = apply({name: value[:, :2] for name, value in inputs.items()})
    np.testing.assert_allclose(shorter["predictions"], outputs["predictions"][:, :2], atol=1e-5)


def test_a_prompt_longer_than_its_positions_is_told():
    network = in_context_model(gpt(**SMALL))
    with pytest.raises(UserError, match="12 tokens, but 10 learned positions"):
        network.init(jax.random.key(0), prompts(points=6))


def test_a_config_builds_a_network_with_a_looped_backbone():
    block = dict(name="gpt", n_embd=8, n_layer=1, n_head=2, positions="none")
    section = dict(
        name="jaxlab.methods.in_context.model:in_context_model",
        backbone=dict(name="looped", block=block, loops=2),
        layout="own",
    )
    network = build("network", section)
    variables = jax.eval_shape(network.init, jax.random.key(0), prompts())
    assert set(variables["params"]["backbone"]["block"]) == {"h_0", "ln_f"}
    with pytest.raises(UserError, match="gpt\\(\\) takes no 'n_heads'. Did you mean 'n_head'"):
        build("network", {**section, "backbone": {**block, "n_heads": 2}})
