"""Stages of training a classifier and fine-tuning it with outliers. Not a config itself."""


def sgd(learning_rate, steps):
    """Nesterov SGD with L2 on every parameter, as in the energy paper's Section 4.1 and code."""
    schedule = dict(
        name="jaxlab.methods.ood_detection.energy:cosine_schedule",
        init_value=learning_rate,
        decay_steps=steps,
    )
    return dict(
        name="chain",
        args=[
            dict(name="add_decayed_weights", weight_decay=5e-4),
            dict(name="sgd", learning_rate=schedule, momentum=0.9, nesterov=True),
        ],
    )


def stage(method, data, *, steps, learning_rate, checkpoint_every, **more):
    optimizer = sgd(learning_rate, steps)
    return dict(
        method=method, data=data, steps=steps, checkpoint_every=checkpoint_every, optimizer=optimizer, **more
    )


def with_outliers(stream, outliers, *, batch_size, transforms):
    """A stream with twice as many outliers as examples in each batch, as in the energy paper."""
    auxiliary = dict(
        name="streams.resident", dataset=outliers, batch_size=2 * batch_size, transforms=transforms
    )
    return dict(name="streams.with_auxiliary", stream=stream, auxiliary=auxiliary)
