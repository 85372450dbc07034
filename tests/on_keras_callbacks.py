"""Keras's callbacks on a model that fastadam.keras trains: test_keras_adam.py runs this file on the backends with fit."""

from __future__ import annotations

import fastadam.keras
import keras
import numpy as np
import pytest
from on_keras_models import assert_same, fit_with, model_with, state
from on_keras_steps import EXACT, array, assert_near, only

pytest.importorskip("h5py")
with_fit = only("torch", "jax")  # Keras's NumPy backend has none
callbacks = keras.callbacks


class Interruption(keras.callbacks.Callback):
    """Ends the training at the beginning of an epoch, or after one of its batches, as Ctrl-C does."""

    def __init__(self, epoch, batch=None):
        super().__init__()
        self.at, self.epoch = (epoch, batch), 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.reach(None)

    def on_train_batch_end(self, batch, logs=None):
        self.reach(batch)

    def reach(self, batch):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


class Rates(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(float(array(self.model.optimizer.learning_rate)))


@with_fit
def test_a_backup_is_restored_to_the_bit(tmp_path):
    """In a new model, as in a process that was started again."""

    def model():
        return model_with(fastadam.keras.AdamW(0.01, amsgrad=True))

    expected = model()
    fit_with(expected, [], epochs=3)
    interrupted = [callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False), Interruption(2)]
    with pytest.raises(KeyboardInterrupt):
        fit_with(model(), interrupted, epochs=3)
    resumed = model()
    fit_with(resumed, [callbacks.BackupAndRestore(tmp_path)], epochs=3)
    assert_same(state(resumed), state(expected))


@with_fit
@pytest.mark.parametrize(("every", "batch"), [(1, 1), (3, 2)])
def test_a_backup_in_the_middle_of_an_epoch_is_restored_to_the_bit(every, batch, tmp_path):
    """Keras starts the epoch again, whatever the optimizer: here after two of its four batches."""

    def model():
        return model_with(fastadam.keras.AdamW(keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.5)))

    interrupted = [
        callbacks.BackupAndRestore(tmp_path, save_freq=every, delete_checkpoint=False),
        Interruption(1, batch),
    ]
    with pytest.raises(KeyboardInterrupt):
        fit_with(model(), interrupted, epochs=3)
    resumed = model()
    fit_with(resumed, [callbacks.BackupAndRestore(tmp_path, save_freq=every)], epochs=3)
    expected = model()
    fit_with(expected, [], epochs=1)
    with pytest.raises(KeyboardInterrupt):
        fit_with(expected, [Interruption(0, 1)], epochs=1)
    fit_with(expected, [], epochs=2)
    assert int(array(resumed.optimizer.iterations)) == 4 + 2 + 8
    assert_same(state(resumed), state(expected))


@with_fit
def test_a_checkpoint_of_the_whole_model_goes_on_to_the_bit(tmp_path):
    expected = model_with(fastadam.keras.Adam(0.01))
    saves = callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    fit_with(expected, [saves], epochs=3)
    resumed = keras.saving.load_model(tmp_path / "2.keras")
    assert type(resumed.optimizer) is fastadam.keras.Adam
    fit_with(resumed, [], epochs=3, initial_epoch=2)
    assert_same(state(resumed), state(expected))


@with_fit
@pytest.mark.parametrize("at_end", [True, False], ids=["epoch end", "evaluation"])
def test_averages_are_swapped_in_and_out(at_end):
    """Against Keras's optimizer, and back to the bit."""

    class Weights(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seen, self.before = [], None

        def on_train_batch_end(self, batch, logs=None):
            self.before = [array(v) for v in self.model.trainable_variables]

        def on_test_batch_begin(self, batch, logs=None):
            self.seen.append([array(v) for v in self.model.trainable_variables])

        def on_epoch_end(self, epoch, logs=None):
            self.seen.append([array(v) for v in self.model.trainable_variables])

        def on_epoch_begin(self, epoch, logs=None):
            if self.before is not None and not at_end:  # the trained weights, not their averages
                assert_same([array(v) for v in self.model.trainable_variables], self.before)

    def seen(kind):
        model = model_with(kind(0.0078125, **EXACT, use_ema=True, ema_momentum=0.5))
        weights = Weights()
        fit_with(model, [callbacks.SwapEMAWeights(swap_on_epoch=at_end), weights], epochs=3, validates=True)
        return weights.seen

    found, expected = seen(fastadam.keras.Adam), seen(keras.optimizers.Adam)
    assert len(found) == len(expected) > 3
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, steps=1, update=1e-6)


@with_fit
@pytest.mark.parametrize(
    "callback",
    [
        lambda: callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5),
        lambda: callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=1e9),
    ],
    ids=["schedule", "plateau"],
)
def test_a_rate_that_a_callback_sets_is_used_by_the_next_step(callback):
    found, expected = (model_with(kind(0.0625, **EXACT)) for kind in (fastadam.keras.Adam, keras.optimizers.Adam))
    first, second = Rates(), Rates()
    fit_with(found, [callback(), first], epochs=4)
    fit_with(expected, [callback(), second], epochs=4)
    assert first.seen == second.seen
    assert first.seen[-1] < 0.0625
    # With a step of another rate they would be 1e-3 apart.
    assert_near(found.trainable_variables, expected.trainable_variables, steps=1, update=1e-5)
    still = model_with(fastadam.keras.Adam(0.0625, **EXACT))
    fit_with(still, [], epochs=4)
    pairs = zip(still.trainable_variables, found.trainable_variables, strict=True)
    assert max(np.abs(array(a) - array(b)).max() for a, b in pairs) > 1e-3


@with_fit
def test_what_a_subclass_does_in_assign_is_in_the_trained_model():
    """Under `fit`, which JAX compiles, for weights and moments alike: here it keeps them within bounds."""

    class Bounded(fastadam.keras.Adam):
        written = ()

        def assign(self, variable, value):
            self.written = (*self.written, variable.path)
            super().assign(variable, keras.ops.clip(value, -0.125, 0.125))

    model, free = model_with(Bounded(0.0625)), model_with(fastadam.keras.Adam(0.0625))
    fit_with(model, [], epochs=1)
    fit_with(free, [], epochs=1)
    slots = [v for v in model.optimizer.variables if "momentum" in v.path or "velocity" in v.path]
    assert len(slots) == 2 * len(model.trainable_variables)
    assert {v.path for v in [*model.trainable_variables, *slots]} <= set(model.optimizer.written)
    for variable, other in zip(model.trainable_variables, free.trainable_variables, strict=True):
        assert np.abs(array(variable)).max() <= 0.125 < np.abs(array(other)).max(), variable.path
    assert all(np.abs(array(slot)).max() <= 0.125 for slot in slots)
