"""A run of the toy problem, built by hand as the experiment builds it from a config."""

import jax
import numpy as np
import optax

from jaxlab.methods.supervised.erm import erm
from jaxlab.nn.conv_net import conv_net
from jaxlab.nn.mlp import mlp
from jaxlab.train import devices
from jaxlab.train.program import make_program
from tests import toy

BATCH_SIZE = 16


def make(
    *,
    seed=0,
    seeds=2,
    mesh=(1, 1),
    backend="mesh",
    stream=None,
    network="mlp",
    log_every=10,
    make_method=None,
    **more,
):
    """A program of `erm` on the blobs, over `mesh` (seed, data) devices."""
    networks = {
        "mlp": mlp(num_classes=2, hidden=(8,), norm="batch_norm"),
        "conv_net": conv_net(num_classes=2, channels=(4,), strides=(1,)),
    }
    method = erm(networks[network], optax.sgd(0.1, momentum=0.9))
    return make_program(
        make_method or (lambda handed_over: method),
        stream or toy.blobs(BATCH_SIZE),
        mesh=devices.make_mesh(*mesh, seeds=seeds, batch_size=BATCH_SIZE),
        seed=seed,
        seeds=seeds,
        log_every=log_every,
        steps_per_call=100,
        backend=backend,
        **more,
    )


def run(program, calls=((0, 7), (7, 3), (10, 2))):
    """The gathered replicas after some calls (first step, number of steps)."""
    replicas = program.init()
    for step, num_steps in calls:
        if program.steps_per_call > 1:
            replicas, _ = program.call(replicas, step, num_steps, None)
            continue
        for i, batch in enumerate(program.host_batches(step, step + num_steps)):
            replicas, _ = program.call(replicas, step + i, 1, batch)
    return program.gather(replicas)


def assert_close(a, b, rtol=2e-4):
    """Equal to float tolerance: devices add up in another order."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=2e-5), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
