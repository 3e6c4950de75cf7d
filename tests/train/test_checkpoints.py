"""A checkpoint comes back bit for bit, or is recognised as damaged; never anything in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core import UserError
from jaxlab.train.checkpoints import Checkpoints, checksum, differences

CONFIG = {"steps": 10, "method": {"name": "erm", "q": 0.7}, "devices": {"data": 1}}


def state(value):
    """A tree with every kind of leaf that methods keep."""
    return {
        "params": {"kernel": jnp.full((2, 64, 32), value, jnp.float32)},
        "half": jnp.full((5,), value, jnp.bfloat16),
        "seen": jnp.array([True, False, True]),
        "count": jnp.int32(value),
        "key": jax.random.key(int(value)),
        "opt": (jnp.arange(7, dtype=jnp.uint8), [jnp.zeros(())]),
    }


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


@pytest.fixture
def saved(tmp_path):
    """A run's folder with checkpoints of steps 10, 20 and 30; the state of step s is state(s)."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", CONFIG, max_to_keep=3)
    for step in (10, 20, 30):
        checkpoints.save(step, state(step))
    checkpoints.close()
    return tmp_path


def restore(workdir, config=CONFIG, step=None):
    checkpoints = Checkpoints(workdir / "checkpoints", config, max_to_keep=3)
    restored = checkpoints.restore(abstract(), step)
    checkpoints.close()
    return restored


def assert_is(restored, step):
    assert restored[0] == step
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            *(
                jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
                for x in (a, b)
            )
        ),
        restored[1],
        state(step),
    )


def test_the_newest_comes_back_bit_for_bit(saved):
    assert_is(restore(saved), 30)
    assert_is(restore(saved, step=20), 20)


def test_only_the_newest_are_kept(saved):
    checkpoints = Checkpoints(saved / "checkpoints", CONFIG, max_to_keep=2)
    checkpoints.save(40, state(40))
    checkpoints.close()
    assert sorted(int(p.name) for p in (saved / "checkpoints").iterdir() if p.name.isdigit()) == [30, 40]


def test_the_best_by_a_metric_is_kept_beside_the_newest(tmp_path):
    for mode, kept in (("max", [20, 50]), ("min", [30, 50])):
        checkpoints = Checkpoints(
            tmp_path / mode, CONFIG, max_to_keep=1, best_metric="test/accuracy", best_mode=mode
        )
        for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.4), (40, 0.6), (50, 0.7)):
            checkpoints.save(step, state(step), {"test/accuracy": accuracy, "test/nll": 1.0})
        checkpoints.wait()
        assert checkpoints.steps() == kept
        checkpoints.close()


def test_a_best_metric_that_is_not_evaluated_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", CONFIG, best_metric="test/acc")
    with pytest.raises(UserError, match="config.best_metric: no 'test/acc'.*test/accuracy"):
        checkpoints.save(1, state(1), {"test/accuracy": 0.5})
    checkpoints.close()


def files_of(workdir, step):
    return [
        p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file() and p.stat().st_size > 8
    ]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, empty, garbage, delete])
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(saved, damage, caplog):
    for path in files_of(saved, 30):
        damage(path)
    assert_is(restore(saved), 20)
    assert "checkpoint of step 30 cannot be read" in caplog.text
    assert (saved / "checkpoints.unreadable").is_dir()


@pytest.mark.parametrize("damage", [truncate, garbage])
def test_damage_to_any_one_file_gives_the_right_state_or_the_one_before(saved, damage):
    """Some files are only Orbax's own notes; whatever comes back is a true checkpoint."""
    for i in range(len(files_of(saved, 30))):
        files = files_of(saved, 30)
        intact = {p: p.read_bytes() for p in files}
        damage(files[i])
        restored = restore(saved)
        assert_is(restored, restored[0])
        assert restored[0] in (20, 30)
        for path, content in intact.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def test_a_flipped_bit_changes_the_checksum():
    tree = {"a": jnp.arange(6.0), "b": jnp.zeros(3, jnp.int32)}
    changed = [
        {**tree, "a": tree["a"].at[3].set(np.nextafter(np.float32(3), np.float32(4)))},
        {**tree, "a": tree["a"][::-1]},
        {**tree, "a": -tree["a"]},
        {**tree, "b": tree["b"].at[0].set(1)},
    ]
    assert len({int(checksum(t)) for t in (tree, *changed)}) == 5


def test_exchanged_checkpoints_are_recognised(saved):
    a, b, c = (saved / "checkpoints" / name for name in ("20", "30", "exchange"))
    a.rename(c), b.rename(a), c.rename(b)
    assert_is(restore(saved), 10)


def test_all_damaged_means_starting_anew(saved):
    for step in (10, 20, 30):
        for path in files_of(saved, step):
            empty(path)
    assert restore(saved) is None


def test_a_checkpoint_of_another_config_is_refused_with_the_fields_that_differ(saved):
    with pytest.raises(UserError, match=r"another config: method.q: 0.7 → 0.5"):
        restore(saved, {**CONFIG, "method": {"name": "erm", "q": 0.5}})
    assert (saved / "checkpoints" / "30").is_dir()


def test_what_changes_no_result_may_differ(saved):
    assert_is(restore(saved, {**CONFIG, "devices": {"data": 8}}), 30)


def test_a_step_without_checkpoint_lists_those_that_exist(saved):
    with pytest.raises(UserError, match="no checkpoint of step 15; there are: 10, 20, 30"):
        restore(saved, step=15)


def test_differences_name_keys_that_are_new_gone_and_changed():
    old = {"a": 1, "b": {"c": [{"d": 2}]}, "gone": 3, "same": (1, 2)}
    new = {"a": 1, "b": {"c": [{"d": 4}]}, "new": 5, "same": [1, 2]}
    assert differences(old, new) == ["b.c[0].d: 2 → 4", "gone: 3 → absent", "new: absent → 5"]
